//! Says what is going on: a spinner on a terminal, lines elsewhere.

use std::{
    io::{IsTerminal, stderr},
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// How a line begins by which a harness in the lab says that it is alive, and what it does.
pub const ALIVE: &str = "alive:";
/// How often it does.
const BEAT: Duration = Duration::from_secs(5);

/// What is going on now.
static NOW: Mutex<String> = Mutex::new(String::new());

/// What is going on from now on.
pub fn now(what: &str) {
    what.clone_into(&mut NOW.lock().unwrap_or_else(PoisonError::into_inner));
}

/// Goes on saying what is going on for as long as the program runs. Whoever reads it knows a slow machine from one that
/// stands still.
pub fn beat() {
    thread::spawn(|| {
        loop {
            let what = NOW.lock().unwrap_or_else(PoisonError::into_inner).clone();
            eprintln!("{ALIVE} {what}");
            thread::sleep(BEAT);
        }
    });
}

/// One step at a time.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    step: Option<(String, Instant)>,
}

impl Progress {
    /// Nothing goes on yet.
    pub fn new() -> Self {
        let bar = stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} [{elapsed}]") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self { bar, step: None }
    }

    /// The step before is done and this one begins.
    pub fn step(&mut self, what: impl Into<String>) {
        self.finish_step();
        let what = what.into();
        now(&what);
        if let Some(bar) = &self.bar {
            bar.reset_elapsed();
            bar.set_message(what.clone());
        }
        self.step = Some((what, Instant::now()));
    }

    /// Adds what came of it to the line of the step.
    pub fn found(&mut self, what: &str) {
        if let Some((step, _)) = &mut self.step {
            step.push_str(": ");
            step.push_str(what);
        }
    }

    fn finish_step(&mut self) {
        if let Some((what, start)) = self.step.take() {
            let line = format!("{:7.1} s  {what}", start.elapsed().as_secs_f64());
            match &self.bar {
                Some(bar) => bar.println(line),
                None => eprintln!("{line}"),
            }
        }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish_step();
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
