//! What the user sees while something is made: a bar on a terminal, plain lines elsewhere.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// One thing being made, from its start to its end.
#[derive(Debug)]
pub(crate) struct Step {
    what: String,
    bar: ProgressBar,
    started: Instant,
    terminal: bool,
}

/// How far a step has come is measured in one of these.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Measure {
    Bytes(u64),
    /// Lines of output, of which about this many are expected.
    Lines(u64),
    Unknown,
}

impl Step {
    pub(crate) fn start(what: &str, measure: Measure) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let (length, template) = match measure {
            Measure::Bytes(bytes) => (
                Some(bytes),
                "{prefix:28} {bar:30} {bytes:>10}/{total_bytes:10} {bytes_per_sec} {wide_msg}",
            ),
            Measure::Lines(lines) => (
                Some(lines),
                "{prefix:28} {bar:30} {percent:>3}% {elapsed} {wide_msg}",
            ),
            Measure::Unknown => (None, "{prefix:28} {spinner} {elapsed} {wide_msg}"),
        };
        let target = if terminal {
            ProgressDrawTarget::stderr()
        } else {
            eprintln!("{what} ...");
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(length, target);
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(what.to_owned());
        if terminal {
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        Self {
            what: what.to_owned(),
            bar,
            started: Instant::now(),
            terminal,
        }
    }

    pub(crate) fn position(&self, position: u64) {
        self.bar.set_position(position);
    }

    /// One more line of output; never runs past the end of the bar.
    pub(crate) fn line(&self, line: &str) {
        if self
            .bar
            .length()
            .is_none_or(|length| self.bar.position() + 1 < length)
        {
            self.bar.inc(1);
        }
        if self.terminal {
            self.bar
                .set_message(line.trim().chars().take(100).collect::<String>());
        }
    }

    pub(crate) fn done(self) {
        self.bar.finish_and_clear();
        eprintln!(
            "{}: {:.1} s",
            self.what,
            self.started.elapsed().as_secs_f64()
        );
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Something the user should read even when all goes well.
pub(crate) fn notice(text: &str) {
    eprintln!("note: {text}");
}
