//! The request loop.

use std::{
    collections::HashMap,
    fs::{self, OpenOptions},
    io::{BufRead, BufReader, Write},
    sync::{Arc, Mutex},
};

use anyhow::{Context, Result};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use serde_json::Value;

use super::{
    cache::{self, Fragments},
    census, command, files,
    held::Held,
    herd::Herd,
    kernel, kin, mounts, power, scribble,
};
use crate::protocol::{Message, Op, Request};

/// The agent's side of the line, shared with the threads that relay a command's output.
pub(super) type Line = Arc<Mutex<fs::File>>;

/// Serves the harness on a serial port until it goes away.
pub fn serve(path: &str) -> Result<()> {
    let port = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .with_context(|| format!("open {path}"))?;
    let mut settings = tcgetattr(&port).with_context(|| format!("{path} is no terminal"))?;
    settings.make_raw();
    tcsetattr(&port, OptionalActions::Flush, &settings).context("make the port raw")?;
    requests(port)
}

fn requests(port: fs::File) -> Result<()> {
    let line: Line = Arc::new(Mutex::new(port.try_clone().context("duplicate the port")?));
    send(
        &line,
        &Message::Ready {
            kernel: kernel::release(),
            uptime: kernel::uptime()?,
        },
    )?;
    let mut agent = Agent {
        line: Arc::clone(&line),
        held: HashMap::new(),
        herd: None,
        spinner: None,
        restless: None,
        kin: None,
        writer: None,
        fragments: None,
    };
    for text in BufReader::new(port).lines() {
        let text = text.context("read a request")?;
        let Ok(request) = serde_json::from_str::<Request>(&text) else {
            continue;
        };
        let reply = match agent.perform(request.id, request.op) {
            Ok(value) => Message::Reply {
                id: request.id,
                ok: Some(value),
                error: None,
            },
            Err(error) => Message::Reply {
                id: request.id,
                ok: None,
                error: Some(format!("{error:#}")),
            },
        };
        send(&line, &reply)?;
    }
    Ok(())
}

/// Sends one message as one line.
pub(super) fn send(line: &Line, message: &Message) -> Result<()> {
    let mut text = serde_json::to_vec(message)?;
    text.push(b'\n');
    let mut port = line
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    port.write_all(&text).context("write to the harness")
}

#[derive(Debug)]
struct Agent {
    line: Line,
    held: HashMap<String, Held>,
    herd: Option<Herd>,
    spinner: Option<Herd>,
    restless: Option<Herd>,
    kin: Option<Herd>,
    writer: Option<fs::File>,
    fragments: Option<Fragments>,
}

impl Agent {
    fn perform(&mut self, id: u64, op: Op) -> Result<Value> {
        let unit = |()| Value::Null;
        match op {
            Op::Run {
                argv,
                timeout_ms,
                stream,
            } => {
                let relay = stream.then(|| (Arc::clone(&self.line), id));
                Ok(serde_json::to_value(command::run(
                    &argv, timeout_ms, relay,
                )?)?)
            }
            Op::LoadModule { path, params } => kernel::load_module(&path, &params).map(unit),
            Op::UnloadModule { name } => kernel::unload_module(&name).map(unit),
            Op::Read { path } => Ok(fs::read_to_string(&path)
                .with_context(|| format!("read {path}"))?
                .into()),
            Op::Write { path, data } => files::write_once(&path, &data).map(unit),
            Op::List { path } => Ok(serde_json::to_value(files::list(&path)?)?),
            Op::WaitCounter {
                path,
                at_least,
                timeout_ms,
            } => Ok(kernel::wait_counter(&path, at_least, timeout_ms)?.into()),
            Op::MappedFiles => Ok(serde_json::to_value(files::mapped()?)?),
            Op::Checksum { paths } => {
                let sums: Vec<_> = paths.iter().map(|path| files::checksum(path)).collect();
                Ok(serde_json::to_value(sums)?)
            }
            Op::WritePattern {
                path,
                seed,
                offset,
                bytes,
            } => files::write_pattern(&path, seed, offset, bytes).map(unit),
            Op::Hold { path } => {
                let held = Held::map(&path)?;
                self.held.insert(path, held);
                Ok(Value::Null)
            }
            Op::HoldPart {
                path,
                name,
                offset,
                bytes,
            } => {
                let file = fs::File::open(&path).with_context(|| format!("open {path}"))?;
                self.held.insert(name, Held::of(&file, offset, bytes)?);
                Ok(Value::Null)
            }
            Op::HoldMemory {
                name,
                seed,
                bytes,
                sealed,
            } => {
                let held = mounts::memory(&name, seed, bytes, sealed)?;
                self.held.insert(name, held);
                Ok(Value::Null)
            }
            Op::Mount(spec) => mounts::mount(&spec).map(unit),
            Op::Remount { target, readonly } => mounts::remount(&target, readonly).map(unit),
            Op::Unmount { target } => mounts::unmount_once(&target).map(unit),
            Op::UnmountOften {
                mount,
                file,
                rounds,
            } => Ok(serde_json::to_value(mounts::unmount_often(
                &mount, &file, rounds,
            )?)?),
            Op::ManyFiles {
                directory,
                seed,
                files,
            } => mounts::many_files(&directory, seed, files).map(unit),
            Op::ReadThrough { path, times } => mounts::read_through(&path, times).map(unit),
            Op::Rename { from, to } => {
                fs::rename(&from, &to).with_context(|| format!("rename {from} to {to}"))?;
                Ok(Value::Null)
            }
            Op::Truncate { path, bytes } => {
                let file = fs::OpenOptions::new().write(true).open(&path)?;
                file.set_len(bytes)
                    .with_context(|| format!("truncate {path}"))?;
                Ok(Value::Null)
            }
            Op::MakeDirectory { path } => {
                fs::create_dir_all(&path).with_context(|| format!("create {path}"))?;
                Ok(Value::Null)
            }
            Op::HeldSum { path } => Ok(self.held(&path)?.sha256().into()),
            Op::HeldFrames { path } => Ok(self.held(&path)?.frames()?.into()),
            Op::Release { path } => {
                self.held
                    .remove(&path)
                    .with_context(|| format!("{path} is not held"))?;
                Ok(Value::Null)
            }
            Op::Delete { path } => {
                fs::remove_file(&path).with_context(|| format!("delete {path}"))?;
                Ok(Value::Null)
            }
            Op::Evict => kernel::evict().map(unit),
            Op::KernelLog => Ok(serde_json::to_value(kernel::log()?)?),
            Op::Cache { paths, singly } => cache::fill_all(&paths, singly).map(unit),
            Op::Folios { path } => Ok(serde_json::to_value(cache::folios(&path)?)?),
            Op::Tails { path } => Ok(serde_json::to_value(cache::tails(&path)?)?),
            Op::Fragment { bytes } => {
                self.fragments = None;
                if bytes > 0 {
                    self.fragments = Some(Fragments::make(bytes)?);
                }
                Ok(Value::Null)
            }
            Op::SwapOn { device } => power::swap_on(&device).map(unit),
            Op::Kexec(next) => power::kexec(&next).map(unit),
            Op::Herd {
                paths,
                processes,
                pieces,
            } => {
                self.herd = None;
                self.herd = Some(Herd::start(&paths, processes, pieces)?);
                Ok(Value::Null)
            }
            Op::Spin { on } => {
                self.spinner = on.then(Herd::spinner).transpose()?;
                Ok(Value::Null)
            }
            Op::OpenForWriting { path } => {
                let open = |path| fs::File::options().read(true).write(true).open(path);
                self.writer = path.map(open).transpose()?;
                Ok(Value::Null)
            }
            Op::Restless { path, shared } => {
                let start = |path| Herd::restless(path, shared);
                self.restless = path.as_deref().map(start).transpose()?;
                Ok(Value::Null)
            }
            Op::Kin { kind, path } => {
                self.kin = None;
                self.kin = path.map(|path| kin::start(kind, &path)).transpose()?;
                Ok(Value::Null)
            }
            Op::Census => Ok(serde_json::to_value(census::take()?)?),
            Op::MappedRuns => Ok(serde_json::to_value(census::mapped_runs()?)?),
            Op::Scribble {
                device,
                seed,
                rounds,
            } => Ok(scribble::scribble(&device, seed, rounds)?.into()),
            Op::Renice { name, nice } => {
                kernel::renice(&name, nice)?;
                Ok(Value::Null)
            }
            Op::ThreadTime { name, counter } => {
                Ok(serde_json::to_value(kernel::thread_time(&name, &counter)?)?)
            }
        }
    }

    fn held(&self, path: &str) -> Result<&Held> {
        self.held
            .get(path)
            .with_context(|| format!("{path} is not held"))
    }
}
