// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the live screen shows; draws, and does nothing else.

use super::table::{group_title, state};
use super::{human_bytes, human_pages};
use crate::protocol::Status;
use ratatui::Frame;
use ratatui::layout::{Alignment, Constraint, Layout};
use ratatui::style::{Modifier, Style, Stylize};
use ratatui::text::{Line, Text};
use ratatui::widgets::{Block, Cell, Paragraph, Row, Sparkline, Table, TableState};

/// Figures kept for the curve.
const HISTORY: usize = 240;

/// What the screen is about.
#[derive(Debug, Default)]
pub(super) struct Screen {
    status: Status,
    /// Why the figures are old, if they are.
    trouble: Option<String>,
    /// MiB saved, latest first.
    saved: Vec<u64>,
    /// CPU seconds of all engines at the last two looks, and the seconds between them.
    cpu: Option<(f64, f64)>,
    cpu_percent: Option<f64>,
    selected: TableState,
}

impl Screen {
    /// Takes new figures, `seconds` after those before.
    pub(super) fn update(&mut self, status: Status, seconds: f64) {
        let cpu: f64 = status.vms.iter().map(|vm| vm.engine.cpu_seconds).sum();
        if let Some((before, _)) = self.cpu.filter(|_| seconds > 0.0) {
            // A VM that has ended takes its seconds along.
            self.cpu_percent = Some(((cpu - before) / seconds * 100.0).max(0.0));
        }
        self.cpu = Some((cpu, seconds));
        self.saved
            .insert(0, (status.bytes_saved.max(0) >> 20) as u64);
        self.saved.truncate(HISTORY);
        self.status = status;
        self.trouble = None;
        let rows = self.status.vms.len();
        let selected = self.selected.selected().unwrap_or(0);
        self.selected
            .select((rows > 0).then(|| selected.min(rows - 1)));
    }

    /// There are no new figures, for this reason.
    pub(super) fn fail(&mut self, reason: String) {
        self.trouble = Some(reason);
    }

    /// Goes to the next VM.
    pub(super) fn down(&mut self) {
        self.selected.select_next();
    }

    /// Goes to the VM before.
    pub(super) fn up(&mut self) {
        self.selected.select_previous();
    }

    /// Draws all.
    pub(super) fn draw(&mut self, frame: &mut Frame<'_>) {
        let groups = self.status.groups.len().clamp(1, 8) as u16 + 2;
        let [head, curve, above, below, foot] = Layout::vertical([
            Constraint::Length(2),
            Constraint::Length(4),
            Constraint::Length(groups),
            Constraint::Min(3),
            Constraint::Length(1),
        ])
        .areas(frame.area());
        frame.render_widget(Paragraph::new(self.head()), head);
        let title = Block::new().title("saved, MiB".dim());
        frame.render_widget(
            Sparkline::default().block(title).data(self.saved.iter()),
            curve,
        );
        frame.render_widget(self.groups(), above);
        let vms = self.vms();
        frame.render_stateful_widget(vms, below, &mut self.selected);
        let keys = "q quit   ↑ ↓ choose".dim();
        let foot_line = match &self.trouble {
            Some(reason) => Line::from(reason.as_str()).bold().red(),
            None => Line::from(keys),
        };
        frame.render_widget(foot_line, foot);
    }

    fn head(&self) -> Text<'_> {
        let status = &self.status;
        let metadata = i64::try_from(status.bytes_metadata).unwrap_or(i64::MAX);
        let cpu = self
            .cpu_percent
            .map_or_else(|| "-".into(), |it| format!("{it:.1}%"));
        Text::from(vec![
            Line::from(vec![
                "pagefusion".bold(),
                format!(
                    "   {} VMs   saved {}   shared {} on {}   metadata {}   CPU {cpu}",
                    status.vms.len(),
                    human_bytes(status.bytes_saved),
                    human_pages(status.pages_shared),
                    human_pages(status.store_pages),
                    human_bytes(metadata),
                )
                .into(),
            ]),
            Line::default(),
        ])
    }

    fn groups(&self) -> Table<'_> {
        let rows = self.status.groups.iter().map(|group| {
            row(
                &[&group_title(&group.name, group.vm)],
                [
                    group.vms.to_string(),
                    human_pages(group.pages_shared),
                    human_pages(group.store_pages),
                    human_pages(group.pages_remembered),
                    human_bytes(group.bytes_saved),
                ],
            )
        });
        let titles = ["Group", "VMs", "Shared", "Store", "Only one has", "Saved"];
        let widths = [20, 6, 12, 12, 13, 12].map(Constraint::Length);
        Table::new(rows, widths).header(header(titles, 1))
    }

    fn vms(&self) -> Table<'static> {
        let rows: Vec<_> = self
            .status
            .vms
            .iter()
            .map(|vm| {
                let group = vm.group.as_deref().unwrap_or("-");
                row(
                    &[&vm.name, group, state(vm)],
                    [
                        vm.pid.to_string(),
                        human_pages(vm.engine.pages_reported),
                        human_pages(vm.engine.pages_shared),
                        human_pages(vm.engine.pages_broken),
                        human_pages(vm.engine.pages_refused),
                        format!("{:.1} s", vm.engine.cpu_seconds),
                    ],
                )
            })
            .collect();
        let titles = [
            "VM", "Group", "State", "PID", "Reported", "Shared", "Broken", "Refused", "CPU",
        ];
        let widths = [20, 14, 10, 8, 10, 10, 10, 10, 8].map(Constraint::Length);
        Table::new(rows, widths)
            .header(header(titles, 3))
            .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED))
    }
}

/// Words to the left, figures to the right.
fn row<const N: usize>(words: &[&str], figures: [String; N]) -> Row<'static> {
    let words = words.iter().map(|it| Cell::from((*it).to_owned()));
    let figures = figures
        .into_iter()
        .map(|it| Cell::from(Text::from(it).alignment(Alignment::Right)));
    Row::new(words.chain(figures).collect::<Vec<_>>())
}

fn header<const N: usize>(titles: [&'static str; N], words: usize) -> Row<'static> {
    let cells = titles.into_iter().enumerate().map(|(at, title)| {
        let side = if at < words {
            Alignment::Left
        } else {
            Alignment::Right
        };
        Cell::from(Text::from(title).alignment(side))
    });
    Row::new(cells.collect::<Vec<_>>()).bold()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{GroupStatus, VmStatus};
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn shown(screen: &mut Screen, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| screen.draw(frame)).unwrap();
        terminal.backend().to_string()
    }

    fn status(cpu_seconds: f64) -> Status {
        let mut vm = VmStatus {
            name: "web1".into(),
            group: Some("ci".into()),
            pid: 4711,
            connected: true,
            ..VmStatus::default()
        };
        vm.engine.guest_attached = true;
        vm.engine.pages_shared = 256;
        vm.engine.cpu_seconds = cpu_seconds;
        let group = GroupStatus {
            name: "ci".into(),
            vms: 1,
            bytes_saved: 5 << 20,
            ..GroupStatus::default()
        };
        Status {
            vms: vec![vm],
            groups: vec![group],
            bytes_saved: 5 << 20,
            ..Status::default()
        }
    }

    #[test]
    fn figures_are_on_the_screen() {
        let mut screen = Screen::default();
        screen.update(status(1.0), 0.0);
        screen.update(status(1.5), 1.0);
        let text = shown(&mut screen, 110, 20);
        for word in ["web1", "sharing", "4711", "1.0 MiB", "5.0 MiB", "CPU 50.0%"] {
            assert!(text.contains(word), "{word} in\n{text}");
        }
    }

    #[test]
    fn trouble_is_told_and_the_last_figures_stay() {
        let mut screen = Screen::default();
        screen.update(status(1.0), 0.0);
        screen.fail("the daemon is gone".into());
        let text = shown(&mut screen, 110, 20);
        assert!(
            text.contains("the daemon is gone") && text.contains("web1"),
            "{text}"
        );
        screen.update(status(1.0), 1.0);
        assert!(!shown(&mut screen, 110, 20).contains("the daemon is gone"));
    }

    #[test]
    fn a_small_terminal_is_no_panic() {
        let mut screen = Screen::default();
        for (width, height) in [(1, 1), (10, 3), (40, 8)] {
            shown(&mut screen, width, height);
        }
        screen.update(status(1.0), 0.0);
        screen.down();
        screen.update(Status::default(), 1.0);
        screen.up();
        shown(&mut screen, 20, 5);
    }
}
