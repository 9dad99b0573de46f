// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Starts a VMM with all that it needs added to its command line and environment.

use crate::protocol::{AdminClient, AdminError, CreatedVm};
use nix::unistd::{self, Uid, User};
use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The library that finds guest memory in an unmodified QEMU.
const PRELOAD: &str = "libpagefusion_preload.so";
/// Where packages put it.
const PRELOAD_DIRECTORY: &str = "/usr/lib/pagefusion";

/// Why a VM could not be started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The daemon said no.
    #[error(transparent)]
    Daemon(#[from] AdminError),
    /// The library is nowhere.
    #[error(
        "{PRELOAD} is neither beside this program nor in {PRELOAD_DIRECTORY}; \
         install it, or name it with --preload"
    )]
    NoPreload,
    /// The library that was named is not there.
    #[error("there is no library {}", .0.display())]
    PreloadMissing(PathBuf),
    /// `LD_PRELOAD` cannot hold it.
    #[error("the path {} holds a space or colon, which LD_PRELOAD cannot; move the library", .0.display())]
    PreloadPath(PathBuf),
    /// QEMU would go on as another process than the one that was registered.
    #[error(
        "-daemonize is not supported: QEMU would leave the registered process; start it in the \
         background instead (systemd-run, or &)"
    )]
    Daemonize,
    /// QEMU would see another root directory while its engine runs.
    #[error(
        "{} chroot is not supported: QEMU would lose its way to /proc and to the daemon; leave it out, or \
         have what starts QEMU change the root", .0.to_string_lossy()
    )]
    ChangesRoot(OsString),
    /// QEMU would become another user's while its engine runs.
    #[error(
        "{} is not supported: QEMU would lose its way to the daemon; start it with: \
         pagefusionctl run --user USER -- …", .0.to_string_lossy()
    )]
    DropsPrivileges(OsString),
    /// No such user.
    #[error("there is no user {0}")]
    NoUser(String),
    /// This process may not become that user.
    #[error("cannot become user {name} ({source}); run this as root")]
    Become {
        /// The user.
        name: String,
        /// What went wrong.
        source: io::Error,
    },
    /// The VMM is not installed.
    #[error(
        "the command {} was not found; install it (Debian: apt install qemu-system-x86), \
         or give its whole path", .0.to_string_lossy()
    )]
    CommandNotFound(OsString),
    /// The VMM could not be started.
    #[error("cannot start {}: {source}", .command.to_string_lossy())]
    Command {
        /// What was to be started.
        command: OsString,
        /// What went wrong.
        source: io::Error,
    },
}

/// A VM to be started.
#[derive(Clone, Debug)]
pub struct Launch {
    /// Runtime directory of the daemon.
    pub runtime_dir: PathBuf,
    /// Name of the VM; made up when `None`.
    pub name: Option<String>,
    /// Trust group; `None` shares with nobody.
    pub group: Option<String>,
    /// User that the VMM is to run as, by name or number; `None` is whose this process is.
    pub user: Option<String>,
    /// The library, unless it is where it belongs.
    pub preload: Option<PathBuf>,
    /// The VMM's command line.
    pub command: Vec<OsString>,
}

impl Launch {
    /// Makes this process the VM. Returns only when that failed.
    pub fn exec(self) -> LaunchError {
        match self.prepare() {
            Ok((mut command, program)) => match command.exec() {
                error if error.kind() == io::ErrorKind::NotFound => {
                    LaunchError::CommandNotFound(program)
                }
                source => LaunchError::Command {
                    command: program,
                    source,
                },
            },
            Err(error) => error,
        }
    }

    fn prepare(self) -> Result<(Command, OsString), LaunchError> {
        if self
            .command
            .iter()
            .any(|word| word == "-daemonize" || word == "--daemonize")
        {
            return Err(LaunchError::Daemonize);
        }
        if let Some(option) = option_for(&self.command, "runas", "user=") {
            return Err(LaunchError::DropsPrivileges(option));
        }
        if let Some(option) = option_for(&self.command, "chroot", "chroot=") {
            return Err(LaunchError::ChangesRoot(option));
        }
        let user = self.user.as_deref().map(find_user).transpose()?;
        let preload = find_preload(self.preload.as_deref())?;
        let mut daemon = AdminClient::connect(&self.runtime_dir)?;
        let uid = user.as_ref().map(|user| user.uid.as_raw());
        let vm = daemon.create_vm_for(self.name, self.group, uid)?;
        let mut words = self.command.into_iter();
        let program = words.next().unwrap_or_default();
        let mut command = Command::new(&program);
        command.args(words).args(device_arguments(&vm));
        for (name, value) in environment(&vm, &preload, std::env::var_os("LD_PRELOAD")) {
            command.env(name, value);
        }
        if let Some(user) = &user {
            become_user(user).map_err(|error| LaunchError::Become {
                name: user.name.clone(),
                source: error.into(),
            })?;
        }
        Ok((command, program))
    }
}

/// The option by which QEMU does something to itself, if it does: one of its own, or a part of
/// `-run-with`.
fn option_for(command: &[OsString], plain: &str, part: &str) -> Option<OsString> {
    let is = |word: &OsString, option: &str| {
        let bytes = word.as_bytes();
        let bytes = bytes.strip_prefix(b"--").or(bytes.strip_prefix(b"-"));
        bytes == Some(option.as_bytes())
    };
    let run_with = |pair: &&[OsString]| {
        let mut parts = pair[1].as_bytes().split(|byte| *byte == b',');
        is(&pair[0], "run-with") && parts.any(|it| it.starts_with(part.as_bytes()))
    };
    let word = command.iter().find(|word| is(word, plain));
    let pair = command.windows(2).find(run_with).map(|pair| &pair[0]);
    word.or(pair).cloned()
}

fn find_user(name: &str) -> Result<User, LaunchError> {
    let found = match name.parse() {
        Ok(number) => User::from_uid(Uid::from_raw(number)),
        Err(_) => User::from_name(name),
    };
    let none = || LaunchError::NoUser(name.to_owned());
    found.ok().flatten().ok_or_else(none)
}

/// Has this process run as `user` for good, with the groups that user is in: `kvm`, say.
fn become_user(user: &User) -> nix::Result<()> {
    let name = CString::new(user.name.as_bytes()).map_err(|_| nix::Error::EINVAL)?;
    unistd::initgroups(&name, user.gid)?;
    unistd::setgid(user.gid)?;
    unistd::setuid(user.uid)
}

fn device_arguments(vm: &CreatedVm) -> Vec<OsString> {
    // In QEMU's option syntax a comma in a value is doubled.
    let option = |before: &str, file: &str, after: &str| {
        let mut option = OsString::from(before);
        let path = vm.directory.join(file);
        let bytes = path.as_os_str().as_bytes();
        let doubled: Vec<u8> = bytes
            .iter()
            .flat_map(|&byte| std::iter::repeat_n(byte, if byte == b',' { 2 } else { 1 }))
            .collect();
        option.push(OsString::from_vec(doubled));
        option.push(after);
        option
    };
    vec![
        "-chardev".into(),
        option("socket,id=pagefusion,path=", "ivshmem.sock", ""),
        "-device".into(),
        // The device's memory belongs to this VM and moves with it: without that, QEMU refuses to
        // migrate or save it.
        "ivshmem-doorbell,chardev=pagefusion,vectors=1,master=on".into(),
        "-qmp".into(),
        option("unix:", "qmp.sock", ",server=on,wait=off"),
    ]
}

fn environment(
    vm: &CreatedVm,
    preload: &Path,
    inherited: Option<OsString>,
) -> [(&'static str, OsString); 4] {
    let mut libraries = preload.as_os_str().to_owned();
    if let Some(inherited) = inherited.filter(|inherited| !inherited.is_empty()) {
        libraries.push(":");
        libraries.push(inherited);
    }
    [
        ("LD_PRELOAD", libraries),
        (
            "PAGEFUSION_ENGINE_SOCKET",
            vm.directory.join("engine.sock").into(),
        ),
        (
            "PAGEFUSION_QMP_SOCKET",
            vm.directory.join("qmp.sock").into(),
        ),
        // It becomes the VMM; what a script starts before is none.
        ("PAGEFUSION_PROCESS", std::process::id().to_string().into()),
    ]
}

pub(super) fn find_preload(named: Option<&Path>) -> Result<PathBuf, LaunchError> {
    let found = match named {
        Some(path) => std::path::absolute(path)
            .ok()
            .filter(|path| path.is_file())
            .ok_or_else(|| LaunchError::PreloadMissing(path.into()))?,
        None => {
            let beside = std::env::current_exe()
                .ok()
                .and_then(|it| Some(it.parent()?.to_owned()));
            beside
                .into_iter()
                .chain([PathBuf::from(PRELOAD_DIRECTORY)])
                .map(|directory| directory.join(PRELOAD))
                .find(|path| path.is_file())
                .ok_or(LaunchError::NoPreload)?
        }
    };
    let splits = |path: &OsStr| path.as_bytes().iter().any(|byte| b" :".contains(byte));
    if splits(found.as_os_str()) {
        Err(LaunchError::PreloadPath(found))
    } else {
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_qemu_that_would_leave_its_process_is_refused() {
        let launch = Launch {
            runtime_dir: "/nonexistent".into(),
            name: None,
            group: None,
            user: None,
            preload: None,
            command: words("qemu-system-x86_64 -daemonize"),
        };
        assert!(matches!(launch.exec(), LaunchError::Daemonize));
    }

    fn words(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn a_qemu_that_would_change_its_user_or_root_is_found() {
        let root = |line: &str| option_for(&words(line), "chroot", "chroot=");
        assert!(root("qemu -m 1 -chroot /x").is_some());
        assert!(root("qemu -run-with async-teardown=on,chroot=/x").is_some());
        assert_eq!(root("qemu -run-with user=nobody"), None);
        assert_eq!(root("qemu -name chroot"), None);
        let option = |line: &str| option_for(&words(line), "runas", "user=");
        for line in [
            "qemu -m 1 -runas nobody",
            "qemu -run-with chroot=/x,user=nobody",
            "qemu --run-with user=nobody -m 1",
        ] {
            assert!(option(line).is_some(), "{line}");
        }
        for line in [
            "qemu -m 1",
            "qemu -run-with async-teardown=on",
            "qemu -run-with",
        ] {
            assert_eq!(option(line), None, "{line}");
        }
    }

    #[test]
    fn users_are_found_by_name_and_by_number() {
        assert_eq!(find_user("root").unwrap().uid.as_raw(), 0);
        assert_eq!(find_user("0").unwrap().name, "root");
        let none = find_user("no-such-user");
        assert!(matches!(none, Err(LaunchError::NoUser(name)) if name == "no-such-user"));
    }

    fn vm() -> CreatedVm {
        CreatedVm {
            number: 3,
            name: "vm3".into(),
            directory: "/run/a,b/vms/3".into(),
        }
    }

    #[test]
    fn the_device_is_added_to_the_command_line() {
        let arguments = device_arguments(&vm());
        let expected = [
            "-chardev",
            "socket,id=pagefusion,path=/run/a,,b/vms/3/ivshmem.sock",
            "-device",
            "ivshmem-doorbell,chardev=pagefusion,vectors=1,master=on",
            "-qmp",
            "unix:/run/a,,b/vms/3/qmp.sock,server=on,wait=off",
        ];
        assert_eq!(arguments, expected);
    }

    #[test]
    fn other_preloaded_libraries_are_kept() {
        let preload = Path::new("/x/lib.so");
        let [(_, alone), ..] = environment(&vm(), preload, None);
        let [(_, both), ..] = environment(&vm(), preload, Some("/y/other.so".into()));
        assert_eq!(
            (alone.to_str(), both.to_str()),
            (Some("/x/lib.so"), Some("/x/lib.so:/y/other.so"))
        );
    }

    #[test]
    fn a_library_that_cannot_be_loaded_is_refused_before_anything_is_started() {
        assert!(matches!(
            find_preload(Some(Path::new("/nowhere/lib.so"))),
            Err(LaunchError::PreloadMissing(_))
        ));
        let directory = tempfile::Builder::new()
            .prefix("with space ")
            .tempdir()
            .unwrap();
        let path = directory.path().join("lib.so");
        std::fs::write(&path, "").unwrap();
        assert!(matches!(
            find_preload(Some(&path)),
            Err(LaunchError::PreloadPath(_))
        ));
    }
}
