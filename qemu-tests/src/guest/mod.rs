//! One machine: its QEMU, its console, its agent, its monitor.

mod config;
mod debugger;
mod device;
mod lines;
mod monitor;
mod qmp;

use std::{
    ffi::OsString,
    io::Write,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;
use serde_json::Value;

pub use self::config::{Accelerator, Config, Mode};
pub use self::monitor::HIGH;
use self::{
    lines::{Event, Tail},
    qmp::Qmp,
};
use crate::{
    cgroup::MemoryCgroup,
    interrupt,
    process::Process,
    protocol::{Message, Op, Request, RunOutcome},
};

/// The longest a request without a limit of its own may take.
const REQUEST_LIMIT: Duration = Duration::from_secs(120);
/// How often a wait looks for Ctrl-C.
const SLICE: Duration = Duration::from_millis(200);
/// The kernel module's name.
const MODULE: &str = "pagefusion";
/// Where `pf-init` puts the module.
const MODULE_PATH: &str = "/run/pagefusion/pagefusion.ko";
/// The module's directory in sysfs.
pub const SYSFS: &str = "/sys/kernel/pagefusion";

/// A request that the agent has not answered yet.
#[derive(Debug)]
pub struct Pending {
    id: u64,
    what: String,
}

/// How long an answer may take, and how long nothing at all may come meanwhile.
#[derive(Clone, Copy, Debug)]
struct Patience {
    limit: Duration,
    silence: Duration,
}

impl Patience {
    fn of(limit: Duration) -> Self {
        Self {
            limit,
            silence: limit,
        }
    }
}

/// A running machine.
#[derive(Debug)]
pub struct Guest {
    name: String,
    process: Process,
    agent: UnixStream,
    qmp: Qmp,
    events: Receiver<Event>,
    tail: Tail,
    own_log: PathBuf,
    next_id: u64,
    failure: Option<String>,
}

impl Guest {
    /// Starts a machine. `launcher` is the command that ends in QEMU's name: QEMU itself, or `pagefusionctl run … --`
    /// and QEMU. Logs go to `logs`.
    pub fn start(
        config: &Config,
        mut launcher: Command,
        cgroup: Option<&MemoryCgroup>,
        logs: &Path,
    ) -> Result<Self> {
        let (console, console_end) = pair()?;
        let (agent, agent_end) = pair()?;
        let (monitor, monitor_end) = pair()?;
        launcher.args(config.qemu_arguments());
        let ports = [
            ("console", &console_end),
            ("agent", &agent_end),
            ("monitor", &monitor_end),
        ];
        for (id, end) in ports {
            launcher.args([
                "-chardev".into(),
                OsString::from(format!("socket,id=pf-{id},fd={}", end.as_raw_fd())),
            ]);
        }
        launcher.args([
            "-serial",
            "chardev:pf-console",
            "-serial",
            "chardev:pf-agent",
        ]);
        launcher.args(["-mon", "chardev=pf-monitor,mode=control"]);
        let own_log = logs.join(format!("{}.qemu", config.name));
        let log = std::fs::File::create(&own_log).context("create QEMU's log")?;
        launcher
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let procs = cgroup.map(MemoryCgroup::procs).transpose()?;
        let process = Process::spawn(
            &mut launcher,
            procs,
            vec![console_end, agent_end, monitor_end],
        )?;

        let (sender, events) = channel();
        lines::read_agent(
            agent.try_clone().context("duplicate a socket")?,
            sender.clone(),
        );
        let tail = lines::watch_console(
            console,
            &logs.join(format!("{}.console", config.name)),
            sender,
        )?;
        agent
            .set_write_timeout(Some(REQUEST_LIMIT))
            .context("limit writes")?;
        let name = config.name.clone();
        Ok(Self {
            name,
            process,
            agent,
            qmp: Qmp::new(monitor)?,
            events,
            tail,
            own_log,
            next_id: 1,
            failure: None,
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// QEMU's process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Waits for the agent. Returns how long the machine had been up then, by its own clock.
    pub fn wait_agent(&mut self, limit: Duration) -> Result<f64> {
        self.wait(Patience::of(limit), "its agent", |message| match message {
            Message::Ready { uptime, .. } => Some(uptime),
            _ => None,
        })
    }

    /// Asks the agent for something and waits for its answer.
    pub fn request<T: DeserializeOwned>(&mut self, op: Op) -> Result<T> {
        self.request_for(op, REQUEST_LIMIT, |_| {})
    }

    /// The same with another time limit; `output` gets the lines of a streaming program.
    pub fn request_for<T: DeserializeOwned>(
        &mut self,
        op: Op,
        limit: Duration,
        output: impl FnMut(&str),
    ) -> Result<T> {
        self.ask(op, limit, limit, output)
    }

    /// Runs a program that may say nothing for `silence` at most, and ends within `limit`; `output` gets its lines.
    pub fn stream(
        &mut self,
        argv: Vec<String>,
        limit: Duration,
        silence: Duration,
        output: impl FnMut(&str),
    ) -> Result<RunOutcome> {
        let op = Op::Run {
            argv,
            timeout_ms: limit.as_millis() as u64,
            stream: true,
        };
        self.ask(op, limit + REQUEST_LIMIT, silence, output)
    }

    fn ask<T: DeserializeOwned>(
        &mut self,
        op: Op,
        limit: Duration,
        silence: Duration,
        mut output: impl FnMut(&str),
    ) -> Result<T> {
        let pending = self.begin(op)?;
        self.answer(pending, Patience { limit, silence }, &mut output)
    }

    /// Asks the agent for something whose answer is waited for later, or in another QEMU.
    pub fn begin(&mut self, op: Op) -> Result<Pending> {
        self.healthy()?;
        let id = self.next_id;
        self.next_id += 1;
        let what = format!("{op:?}");
        let mut line = serde_json::to_vec(&Request { id, op })?;
        line.push(b'\n');
        self.agent
            .write_all(&line)
            .with_context(|| format!("{}: send {what}", self.name))?;
        Ok(Pending { id, what })
    }

    /// Waits for an answer.
    pub fn finish<T: DeserializeOwned>(
        &mut self,
        pending: Pending,
        limit: Duration,
        output: &mut dyn FnMut(&str),
    ) -> Result<T> {
        self.answer(pending, Patience::of(limit), output)
    }

    fn answer<T: DeserializeOwned>(
        &mut self,
        Pending { id, what }: Pending,
        patience: Patience,
        output: &mut dyn FnMut(&str),
    ) -> Result<T> {
        let answer = self.wait(patience, &what, |message| match message {
            Message::Reply {
                id: replied,
                ok,
                error,
            } if replied == id => Some((ok, error)),
            Message::Output { id: of, line, .. } if of == id => {
                output(&line);
                None
            }
            _ => None,
        })?;
        match answer {
            (_, Some(error)) => bail!("{}: {error}", self.name),
            (ok, None) => serde_json::from_value(ok.unwrap_or(Value::Null))
                .with_context(|| format!("answer to {what}")),
        }
    }

    /// Goes on with the agent that was in `before`, whose machine this QEMU has taken over.
    pub fn take_over(&mut self, before: &Self) {
        self.next_id = before.next_id;
    }

    /// Runs a program to its end.
    pub fn run(&mut self, argv: &[&str]) -> Result<RunOutcome> {
        self.run_for(argv, REQUEST_LIMIT)
    }

    /// The same with another time limit.
    pub fn run_for(&mut self, argv: &[&str], limit: Duration) -> Result<RunOutcome> {
        let argv = argv.iter().map(|&word| word.to_owned()).collect();
        let op = Op::Run {
            argv,
            timeout_ms: limit.as_millis() as u64,
            stream: false,
        };
        let outcome: RunOutcome = self.request_for(op, limit + REQUEST_LIMIT, |_| {})?;
        ensure!(
            !outcome.timed_out,
            "{}: a program took longer than {limit:?}",
            self.name
        );
        Ok(outcome)
    }

    /// Runs a program that must succeed, and returns what it printed.
    pub fn output(&mut self, argv: &[&str]) -> Result<String> {
        let outcome = self.run(argv)?;
        ensure!(
            outcome.status == Some(0),
            "{}: {argv:?} ended with {:?}: {}",
            self.name,
            outcome.status,
            outcome.stderr.trim()
        );
        Ok(outcome.stdout)
    }

    /// Loads the module.
    pub fn load_module(&mut self) -> Result<()> {
        self.load_module_with("")
    }

    /// Loads the module with these parameters.
    pub fn load_module_with(&mut self, params: &str) -> Result<()> {
        self.request(Op::LoadModule {
            path: MODULE_PATH.into(),
            params: params.into(),
        })
    }

    /// Loads the module and lets passes follow each other quickly: scenarios wait for several.
    pub fn load_hurried_module(&mut self) -> Result<()> {
        self.load_module()?;
        self.set("sleep_millisecs", "100")?;
        self.set("max_sleep_millisecs", "500")
    }

    /// Unloads the module.
    pub fn unload_module(&mut self) -> Result<()> {
        self.request(Op::UnloadModule {
            name: MODULE.into(),
        })
    }

    /// Reads a number the module keeps.
    pub fn counter(&mut self, name: &str) -> Result<u64> {
        let text: String = self.request(Op::Read {
            path: format!("{SYSFS}/{name}"),
        })?;
        text.trim()
            .parse()
            .with_context(|| format!("{}: {name} holds {text:?}", self.name))
    }

    /// Everything the module says of itself, in a line.
    pub fn numbers(&mut self) -> Result<String> {
        let mut names: Vec<String> = self.request(Op::List { path: SYSFS.into() })?;
        names.sort_unstable();
        let mut line = String::new();
        for name in names {
            let path = format!("{SYSFS}/{name}");
            // Some may only be written.
            if let Ok(value) = self.request::<String>(Op::Read { path }) {
                line += &format!("{name}:{} ", value.trim());
            }
        }
        Ok(line)
    }

    /// Sets a knob of the module.
    pub fn set(&mut self, name: &str, value: &str) -> Result<()> {
        self.request(Op::Write {
            path: format!("{SYSFS}/{name}"),
            data: value.into(),
        })
    }

    /// What a knob of the module shows.
    pub fn knob(&mut self, name: &str) -> Result<String> {
        let text: String = self.request(Op::Read {
            path: format!("{SYSFS}/{name}"),
        })?;
        let line = text.strip_suffix('\n');
        Ok(line
            .with_context(|| format!("{name} holds {text:?}"))?
            .to_owned())
    }

    /// Waits until the module has made `passes` more full passes.
    pub fn wait_passes(&mut self, passes: u64, limit: Duration) -> Result<u64> {
        let at_least = self.counter("full_scans")? + passes;
        let op = Op::WaitCounter {
            path: format!("{SYSFS}/full_scans"),
            at_least,
            timeout_ms: limit.as_millis() as u64,
        };
        self.request_for(op, limit + REQUEST_LIMIT, |_| {})
    }

    /// Fails when its console has shown something it must not, or when QEMU has ended.
    pub fn healthy(&mut self) -> Result<()> {
        while let Ok(event) = self.events.try_recv() {
            self.note(&event);
        }
        self.fail_if_broken()
    }

    /// Waits for QEMU's end by itself.
    pub fn wait_end(&mut self, limit: Duration) -> Result<()> {
        let ended = self.process.wait(limit)?;
        ensure!(
            ended.is_some(),
            "{}: did not end within {limit:?}",
            self.name
        );
        Ok(())
    }

    /// SIGKILL to QEMU.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// How many lines its console has shown.
    pub fn console_lines(&self) -> usize {
        self.tail.count()
    }

    /// Waits for a line of its console after the first `after`.
    pub fn wait_line(&self, text: &str, after: usize, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        while !self.tail.wait_for(text, after, SLICE) {
            interrupt::check()?;
            ensure!(
                Instant::now() < deadline,
                "{}: its console has not shown {text:?}, but:\n{}",
                self.name,
                self.tail.text()
            );
        }
        Ok(())
    }

    /// Waits for a console failure, which a test provoked.
    pub fn wait_failure(&mut self, limit: Duration) -> Result<String> {
        let deadline = Instant::now() + limit;
        while self.failure.is_none() {
            let Some(event) = self.next_event(deadline)? else {
                bail!("{}: nothing failed", self.name)
            };
            self.note(&event);
        }
        Ok(self.failure.clone().unwrap_or_default())
    }

    fn wait<T>(
        &mut self,
        patience: Patience,
        what: &str,
        mut take: impl FnMut(Message) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + patience.limit;
        loop {
            let silent = Instant::now() + patience.silence;
            let Some(event) = self.next_event(deadline.min(silent))? else {
                let waited = patience.silence.min(patience.limit);
                bail!(
                    "{}: nothing for {waited:?}, waiting for {what}; the console's last lines:\n{}",
                    self.name,
                    self.tail.text()
                );
            };
            self.note(&event);
            self.fail_if_broken()?;
            if let Event::Agent(message) = event {
                if let Some(value) = take(message) {
                    return Ok(value);
                }
            }
        }
    }

    fn next_event(&mut self, deadline: Instant) -> Result<Option<Event>> {
        loop {
            interrupt::check()?;
            let left = deadline.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left.min(SLICE)) {
                Ok(event) => return Ok(Some(event)),
                Err(RecvTimeoutError::Timeout) if left.is_zero() => return Ok(None),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(Some(Event::Closed)),
            }
        }
    }

    fn note(&mut self, event: &Event) {
        let failure = match event {
            Event::Fatal(line) => {
                if self.failure.is_none() {
                    self.tail.wait_for_trace();
                }
                line.clone()
            }
            Event::Closed => {
                let said = std::fs::read_to_string(&self.own_log).unwrap_or_default();
                let last = said
                    .lines()
                    .rfind(|line| !line.trim().is_empty())
                    .unwrap_or("it said nothing");
                // Its sockets close just before it is a zombie.
                let status = self.process.wait(SLICE).ok().flatten();
                let status =
                    status.map_or_else(|| "not gone yet".to_owned(), |status| status.to_string());
                format!("QEMU has ended ({status}): {last}")
            }
            Event::Agent(_) => return,
        };
        self.failure.get_or_insert(failure);
    }

    fn fail_if_broken(&self) -> Result<()> {
        let Some(failure) = &self.failure else {
            return Ok(());
        };
        bail!(
            "{}: {failure}; the console's last lines:\n{}",
            self.name,
            self.tail.text()
        );
    }
}

/// A connected pair: the harness's end and the one QEMU inherits.
fn pair() -> Result<(UnixStream, OwnedFd)> {
    let (mine, theirs) = UnixStream::pair().context("make a socket pair")?;
    Ok((mine, theirs.into()))
}

#[cfg(test)]
mod tests;
