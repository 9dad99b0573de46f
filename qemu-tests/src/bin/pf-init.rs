//! The first program of every machine the tests boot, and the agent in it. Statically linked; it is alone in the
//! initramfs.
//!
//! Started as any process but the first, it is the agent, or what the agent starts to map a file.
//!
//! `pf.mode=` on the kernel command line says what becomes of the machine:
//!
//! * `systemd` – the disk becomes the root and its own init takes over (a Debian guest);
//! * `bare` – the disk becomes the root, and the agent runs there alone;
//! * `agent` – no disk, only the agent (a machine that tests one thing);
//! * `lab` – the disk becomes the root, the second disk is mounted on `/run/pagefusion`, and the agent runs there (a
//!   host in which KVM guests are started).

use std::{
    convert::Infallible,
    fs::{self, File},
    io::ErrorKind,
    mem::MaybeUninit,
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, bail};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::inotify,
    mount::{MountFlags, mount, mount_move},
    system::{RebootCommand, reboot},
};

const ROOT: &str = "/newroot";
/// Where agent and module are, in the initramfs as in the root.
const RUN: &str = "/run/pagefusion";

/// Where the harness listens.
const PORT: &str = "/dev/ttyS1";

fn main() -> ExitCode {
    if !rustix::process::getpid().is_init() {
        let arguments: Vec<_> = std::env::args().skip(1).collect();
        let result = match &*arguments {
            [word, path] if word == qemu_tests::agent::TOUCH => qemu_tests::agent::touch(path),
            _ => qemu_tests::agent::serve(PORT),
        };
        return match result {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("agent: {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    let Err(error) = run();
    eprintln!("pf-init: {error:#}");
    power_off();
    // A first process that ends is a panic, which the harness sees.
    ExitCode::FAILURE
}

fn run() -> Result<Infallible> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        mount_at(kind, kind, target, MountFlags::empty(), "")?;
    }
    let arguments = fs::read_to_string("/proc/cmdline").context("read the kernel command line")?;
    let mode = arguments
        .split_whitespace()
        .find_map(|word| word.strip_prefix("pf.mode="));
    load_modules()?;
    match mode {
        Some("systemd") => systemd(),
        Some("bare") => bare(),
        Some("agent") => agent(),
        Some("lab") => lab(),
        other => bail!("pf.mode is {other:?}, not systemd, bare, agent or lab"),
    }
}

fn systemd() -> Result<Infallible> {
    mount_disk("vda", ROOT, MountFlags::empty())?;
    mount_at(
        "tmpfs",
        "tmpfs",
        &format!("{ROOT}/run"),
        MountFlags::NODEV | MountFlags::NOSUID,
        "mode=0755",
    )?;
    copy_run(&format!("{ROOT}{RUN}"))?;
    move_to_root(&["dev", "proc", "sys"])?;
    enter_root()?;
    Err(Command::new("/sbin/init").exec()).context("start /sbin/init")
}

fn bare() -> Result<Infallible> {
    let under = |path: &str| format!("{ROOT}{path}");
    mount_disk("vda", ROOT, MountFlags::empty())?;
    for path in ["/run", "/tmp"] {
        mount_at(
            "tmpfs",
            "tmpfs",
            &under(path),
            MountFlags::NODEV | MountFlags::NOSUID,
            "",
        )?;
    }
    copy_run(&under(RUN))?;
    move_to_root(&["dev", "proc", "sys"])?;
    mount_at(
        "tmpfs",
        "tmpfs",
        &under("/dev/shm"),
        MountFlags::NODEV | MountFlags::NOSUID,
        "",
    )?;
    enter_root()?;
    serve(&format!("{RUN}/agent"))
}

fn agent() -> Result<Infallible> {
    mount_at("tmpfs", "tmpfs", "/tmp", MountFlags::empty(), "")?;
    serve(&format!("{RUN}/agent"))
}

fn lab() -> Result<Infallible> {
    let plain = MountFlags::NODEV | MountFlags::NOSUID;
    let under = |path: &str| format!("{ROOT}{path}");
    mount_disk("vda", ROOT, MountFlags::empty())?;
    mount_at("tmpfs", "tmpfs", &under("/run"), plain, "")?;
    mount_disk("vdb", &under(RUN), MountFlags::RDONLY)?;
    move_to_root(&["dev", "proc", "sys"])?;
    mount_at("tmpfs", "tmpfs", &under("/tmp"), plain, "")?;
    mount_at("tmpfs", "tmpfs", &under("/dev/shm"), plain, "")?;
    mount_at(
        "cgroup2",
        "cgroup2",
        &under("/sys/fs/cgroup"),
        MountFlags::empty(),
        "",
    )?;
    enter_root()?;
    serve(&format!("{RUN}/bin/pf-init"))
}

fn move_to_root(directories: &[&str]) -> Result<()> {
    for directory in directories {
        mount_move(format!("/{directory}"), format!("{ROOT}/{directory}"))
            .with_context(|| format!("move /{directory} to the new root"))?;
    }
    Ok(())
}

/// Runs the agent to its end, reaping whatever else ends meanwhile, and switches the machine off.
fn serve(program: &str) -> Result<Infallible> {
    let agent = Command::new(program)
        .spawn()
        .with_context(|| format!("start {program}"))?;
    let agent = rustix::process::Pid::from_child(&agent);
    loop {
        match rustix::process::wait(rustix::process::WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid == agent => {
                println!("pf-init: the agent ended: {status:?}");
                power_off();
                bail!("the machine did not power off");
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("wait for the agent"),
        }
    }
}

/// Loads what the initramfs names, in that order. A module without its hardware is no error: the list serves every
/// machine.
fn load_modules() -> Result<()> {
    let list = match fs::read_to_string("/modules/order") {
        Ok(list) => list,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).context("read /modules/order"),
    };
    for name in list.lines() {
        let file = File::open(format!("/modules/{name}"))
            .with_context(|| format!("open module {name}"))?;
        match rustix::system::finit_module(&file, c"", 0) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(rustix::io::Errno::NODEV | rustix::io::Errno::OPNOTSUPP) => {
                println!("pf-init: no hardware for {name}");
            }
            Err(error) => return Err(error).with_context(|| format!("load {name}")),
        }
    }
    Ok(())
}

fn mount_at(kind: &str, source: &str, target: &str, flags: MountFlags, data: &str) -> Result<()> {
    fs::create_dir_all(target).with_context(|| format!("create {target}"))?;
    let data = std::ffi::CString::new(data)?;
    mount(source, target, kind, flags, Some(data.as_c_str()))
        .with_context(|| format!("mount {kind} on {target}"))
}

fn mount_disk(disk: &str, target: &str, flags: MountFlags) -> Result<()> {
    wait_for_device(disk)?;
    mount_at("ext4", &format!("/dev/{disk}"), target, flags, "")
}

/// Waits until devtmpfs has the node.
fn wait_for_device(name: &str) -> Result<()> {
    let path = Path::new("/dev").join(name);
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC).context("inotify")?;
    inotify::add_watch(&watch, "/dev", inotify::WatchFlags::CREATE).context("watch /dev")?;
    let limit = Timespec {
        tv_sec: 30,
        tv_nsec: 0,
    };
    let mut buffer = [MaybeUninit::uninit(); 1024];
    while !path.exists() {
        if poll(&mut [PollFd::new(&watch, PollFlags::IN)], Some(&limit))
            .context("wait for a device")?
            == 0
        {
            bail!("{} did not appear", path.display());
        }
        inotify::Reader::new(&watch, &mut buffer)
            .next()
            .context("read device events")?;
    }
    Ok(())
}

fn copy_run(target: &str) -> Result<()> {
    fs::create_dir_all(target).with_context(|| format!("create {target}"))?;
    for entry in fs::read_dir(RUN).context("list the initramfs")? {
        let entry = entry?;
        let to = Path::new(target).join(entry.file_name());
        fs::copy(entry.path(), &to).with_context(|| format!("copy to {}", to.display()))?;
    }
    Ok(())
}

/// Makes the new root the root. What the initramfs held is deleted first: it is memory nobody could reach any more.
fn enter_root() -> Result<()> {
    for path in ["/modules", RUN] {
        if Path::new(path).exists() {
            fs::remove_dir_all(path).with_context(|| format!("empty {path}"))?;
        }
    }
    fs::remove_file("/init").context("delete /init")?;
    std::env::set_current_dir(ROOT).context("enter the new root")?;
    mount_move(".", "/").context("move the new root")?;
    rustix::process::chroot(".").context("chroot")?;
    std::env::set_current_dir("/").context("enter /")
}

fn power_off() {
    rustix::fs::sync();
    if let Err(error) = reboot(RebootCommand::PowerOff) {
        eprintln!("pf-init: power off: {error}");
    }
}
