// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The live screen: asks the daemon on a thread of its own, so that keys are answered while
//! an engine is slow.

use super::screen::Screen;
use crate::protocol::{AdminClient, AdminError, Status};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

/// Longest until a key or new figures are seen.
const TICK: Duration = Duration::from_millis(100);

type Figures = Result<(Status, Instant), AdminError>;

/// Shows figures every `interval` until the user has seen enough, or `stop` is readable. The
/// terminal is left as it was, whatever ends it.
pub fn top(runtime_dir: &Path, interval: Duration, stop: &UnixStream) -> io::Result<()> {
    stop.set_nonblocking(true)?;
    let (sender, figures) = mpsc::channel();
    // Ends asking when this function returns.
    let (_enough, until) = mpsc::channel::<()>();
    let directory = runtime_dir.to_owned();
    std::thread::Builder::new()
        .name("figures".into())
        .spawn(move || ask(&directory, interval, &sender, &until))?;
    // Restores the terminal on a panic, too.
    let mut terminal = ratatui::try_init()?;
    let result = show(&mut terminal, &figures, stop);
    ratatui::try_restore()?;
    result
}

fn show(
    terminal: &mut ratatui::DefaultTerminal,
    figures: &mpsc::Receiver<Figures>,
    stop: &UnixStream,
) -> io::Result<()> {
    let mut screen = Screen::default();
    let mut last: Option<Instant> = None;
    loop {
        for new in figures.try_iter() {
            match new {
                Ok((status, at)) => {
                    let seconds = last.map_or(0.0, |last| (at - last).as_secs_f64());
                    screen.update(status, seconds);
                    last = Some(at);
                }
                Err(error) => screen.fail(error.to_string()),
            }
        }
        terminal.draw(|frame| screen.draw(frame))?;
        if is_stopped(stop) {
            return Ok(());
        }
        if !event::poll(TICK)? {
            continue;
        }
        let Event::Key(key) = event::read()? else {
            continue;
        };
        if key.kind != KeyEventKind::Press {
            continue;
        }
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Ok(()),
            KeyCode::Down | KeyCode::Char('j') => screen.down(),
            KeyCode::Up | KeyCode::Char('k') => screen.up(),
            _ => {}
        }
    }
}

fn is_stopped(mut stop: &UnixStream) -> bool {
    io::Read::read(&mut stop, &mut [0; 1]).is_ok()
}

fn ask(directory: &Path, interval: Duration, sender: &Sender<Figures>, until: &mpsc::Receiver<()>) {
    let mut client = None;
    loop {
        let figures = look(directory, &mut client);
        if figures.is_err() {
            // The next daemon may be there by then.
            client = None;
        }
        if sender.send(figures).is_err() {
            return;
        }
        match until.recv_timeout(interval) {
            Err(RecvTimeoutError::Timeout) => {}
            _ => return,
        }
    }
}

fn look(directory: &Path, client: &mut Option<AdminClient>) -> Figures {
    let client = match client {
        Some(client) => client,
        None => client.insert(AdminClient::connect(directory)?),
    };
    Ok((client.status()?, Instant::now()))
}
