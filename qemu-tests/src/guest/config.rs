//! What a machine is made of, as a QEMU command line.

use std::{ffi::OsString, path::PathBuf};

/// How a machine's CPUs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// QEMU's translator.
    Tcg,
    /// The same, one instruction taking one nanosecond of the guest's time, and waiting none.
    Counted,
    /// Hardware virtualisation, or the lab's emulation of it.
    Kvm,
}

/// What a machine becomes; see `pf-init`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A Debian system from its disk.
    Systemd,
    /// The same Debian root, but with the agent in place of systemd.
    Bare,
    /// Nothing but the agent.
    Agent,
    /// A host for KVM guests.
    Lab,
}

/// A machine to start.
#[derive(Clone, Debug)]
pub struct Config {
    /// Its name in messages and in `pagefusionctl`.
    pub name: String,
    /// What it becomes.
    pub mode: Mode,
    /// How its CPUs run.
    pub accelerator: Accelerator,
    /// Its memory. How QEMU provides it is left to QEMU.
    pub memory_mib: u32,
    /// Its CPUs.
    pub cpus: u32,
    /// QEMU's `-cpu`.
    pub cpu: &'static str,
    /// Kernel image.
    pub kernel: PathBuf,
    /// Initramfs.
    pub initramfs: PathBuf,
    /// Disks, each written to only in a copy that goes with the machine.
    pub disks: Vec<PathBuf>,
    /// Further arguments of the kernel.
    pub kernel_arguments: String,
    /// Further QEMU arguments.
    pub arguments: Vec<OsString>,
}

impl Config {
    /// The machine's part of the command line; the caller adds how to reach it.
    pub(super) fn qemu_arguments(&self) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = Vec::new();
        let mut add = |words: &[&str]| arguments.extend(words.iter().map(OsString::from));
        add(&[
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ]);
        let accelerator = match self.accelerator {
            Accelerator::Tcg => "tcg,thread=multi",
            Accelerator::Counted => "tcg,thread=single",
            Accelerator::Kvm => "kvm",
        };
        add(&[
            "-accel",
            accelerator,
            "-cpu",
            self.cpu,
            "-smp",
            &self.cpus.to_string(),
        ]);
        if self.accelerator == Accelerator::Counted {
            add(&["-icount", "shift=0,sleep=off"]);
        }
        add(&["-m", &self.memory_mib.to_string(), "-name", &self.name]);
        add(&["-device", "virtio-rng-pci"]);
        let mode = match self.mode {
            Mode::Systemd => "systemd",
            Mode::Bare => "bare",
            Mode::Agent => "agent",
            Mode::Lab => "lab",
        };
        // A busy host is late with timer interrupts, which the kernel would take for broken wires. In the lab the
        // check stays, as the machine lost its timer without it; and there a second of a CPU's work takes many, so
        // that what is a hang elsewhere is not one.
        //
        // QEMU marks interrupts in a word that its emulation of SVM writes without the lock when it enters a guest, so
        // that now and then one is lost. When the timer is set anew each time, a lost one is the last, and the
        // machine stands still until another device speaks; a periodic timer comes again 4 ms later.
        let timer = match self.mode {
            Mode::Lab => "nohz=off highres=off rcupdate.rcu_cpu_stall_timeout=120",
            _ => "no_timer_check",
        };
        // Warnings and worse reach the console; the first oops ends the machine. Mitigations of hardware that is not
        // there only cost time.
        let kernel = format!(
            "console=ttyS0 loglevel=5 panic=-1 oops=panic mitigations=off {timer} rdinit=/init pf.mode={mode} {}",
            self.kernel_arguments
        );
        add(&["-append", &kernel]);
        arguments.extend(["-kernel".into(), self.kernel.clone().into()]);
        arguments.extend(["-initrd".into(), self.initramfs.clone().into()]);
        for disk in &self.disks {
            let mut drive = OsString::from("if=virtio,format=raw,snapshot=on,file=");
            // QEMU splits at commas unless they are doubled.
            drive.push(disk.to_string_lossy().replace(',', ",,"));
            arguments.extend(["-drive".into(), drive]);
        }
        arguments.extend(self.arguments.iter().cloned());
        arguments
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_left_as_qemu_sets_it_up() {
        let config = Config {
            name: "a".into(),
            mode: Mode::Systemd,
            accelerator: Accelerator::Tcg,
            memory_mib: 512,
            cpus: 1,
            cpu: "max",
            kernel: "/k".into(),
            initramfs: "/i".into(),
            disks: vec!["/with,comma".into()],
            kernel_arguments: String::new(),
            arguments: vec![],
        };
        let line: Vec<_> = config
            .qemu_arguments()
            .iter()
            .map(|word| word.to_string_lossy().into_owned())
            .collect();
        let line = line.join(" ");
        assert!(line.contains("-m 512 "));
        assert!(line.contains("file=/with,,comma"));
        for option in [
            "memory-backend",
            "mem-path",
            "mem-prealloc",
            "mem-lock",
            "merge=",
        ] {
            assert!(!line.contains(option), "{line}");
        }
    }
}
