// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The command line.

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use pagefusion_host::operator::{parse_memory, parse_size};
use pagefusion_host::protocol::{
    Choice, Limit, LimitChanges, Mode, Policy, PolicyChanges, Scope, Selection, SplitHugePages,
};
use std::ffi::OsString;
use std::path::PathBuf;

/// Controls pagefusiond.
///
/// Exit status: 0 done; 1 failed, or `doctor` found something that must be mended; 2 wrong
/// usage; 3 the daemon cannot be reached.
#[derive(Debug, Parser)]
#[command(version)]
pub(crate) struct Arguments {
    /// Runtime directory of the daemon.
    #[arg(
        long,
        value_name = "DIR",
        default_value = "/run/pagefusion",
        global = true
    )]
    pub(crate) runtime_dir: PathBuf,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Shows what is shared and what that saves.
    Status(Format),
    /// Shows the VMs.
    Vms(Format),
    /// Shows the trust groups.
    Groups(Format),
    /// Shows the files that save most.
    Files {
        /// Only those of a trust group.
        #[arg(long, value_name = "NAME")]
        group: Option<String>,
        /// How many; 0 is all.
        #[arg(long, value_name = "COUNT", default_value_t = 20)]
        limit: usize,
        #[command(flatten)]
        format: Format,
    },
    /// Says why a VM shares no more than it does.
    Explain {
        /// Name, number or process of the VM.
        #[arg(value_name = "VM|PID")]
        vm: String,
        #[command(flatten)]
        format: Format,
    },
    /// Turns shared memory back into ordinary memory; sharing stays off until resumed.
    Undo {
        #[command(flatten)]
        scope: ScopeArguments,
        /// Only this file, by name or by the id that `files --json` shows.
        #[arg(long, value_name = "FILE", conflicts_with = "gfn")]
        file: Option<String>,
        /// Only these guest frames of one VM: the first, or FIRST+COUNT. They are shared again
        /// when the guest reports them again.
        #[arg(long, value_name = "GFN[+COUNT]", value_parser = parse_frames, conflicts_with_all = ["all", "group"])]
        gfn: Option<(u64, u64)>,
        #[command(flatten)]
        format: Format,
    },
    /// Shares nothing more; what is shared stays so.
    Pause {
        #[command(flatten)]
        scope: ScopeArguments,
        #[command(flatten)]
        format: Format,
    },
    /// Shares again.
    Resume {
        #[command(flatten)]
        scope: ScopeArguments,
        /// Only this file, by the name it was undone by or its id.
        #[arg(long, value_name = "FILE")]
        file: Option<String>,
        #[command(flatten)]
        format: Format,
    },
    /// Sets when groups share, and what they and VMs may take of the host.
    Set {
        #[command(flatten)]
        scope: ScopeArguments,
        /// Limits for each VM of the scope; otherwise for each group as a whole.
        #[arg(long, conflicts_with = "vm", requires = "limits")]
        each_vm: bool,
        #[command(flatten)]
        limits: LimitArguments,
        #[command(flatten)]
        format: Format,
    },
    /// Checks whether this host is fit for sharing.
    Doctor {
        /// Directory of the daemon's store.
        #[arg(long, value_name = "DIR", default_value = "/dev/shm/pagefusion")]
        store_dir: PathBuf,
        /// The QEMU that VMs are started with.
        #[arg(long, value_name = "COMMAND", default_value = "qemu-system-x86_64")]
        qemu: OsString,
        /// The library libpagefusion_preload.so, unless it is in its usual place.
        #[arg(long, value_name = "PATH")]
        preload: Option<PathBuf>,
        #[command(flatten)]
        format: Format,
    },
    /// Shows figures live.
    Top {
        /// Between two looks.
        #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
        interval: u64,
    },
    /// Starts a VM that shares memory with the others of its group.
    Run {
        /// Trust group; without one the VM shares with nobody but itself.
        #[arg(long)]
        group: Option<String>,
        /// Name of the VM.
        #[arg(long)]
        name: Option<String>,
        /// User that QEMU is to run as, by name or number, with the groups it is in.
        #[arg(long)]
        user: Option<String>,
        /// The library libpagefusion_preload.so, unless it is in its usual place.
        #[arg(long, value_name = "PATH")]
        preload: Option<PathBuf>,
        /// Command line of QEMU.
        #[arg(last = true, required = true, value_name = "COMMAND")]
        command: Vec<OsString>,
    },
    /// Writes a script that completes this command's words, for a shell.
    Completions {
        /// Which shell.
        shell: Shell,
    },
}

#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Format {
    /// For programs.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct ScopeArguments {
    /// Every VM, and those started later.
    #[arg(long)]
    all: bool,
    /// VMs of a trust group, and those started later.
    #[arg(long, value_name = "NAME")]
    group: Option<String>,
    /// One VM, by name or number.
    #[arg(long, value_name = "VM")]
    vm: Option<String>,
}

/// Takes back what a group or VM was set to.
const INHERIT: &str = "inherit";

#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
#[command(group(ArgGroup::new("limits").multiple(true)))]
pub(crate) struct LimitArguments {
    /// Memory for shared pages; of a VM: those it was the second to have. SIZE is bytes, or with
    /// K, M, G or T; none (or inherit) is no limit of its own, so that the next wider one holds.
    #[arg(long, value_name = "SIZE|none", value_parser = parse_limit, group = "limits")]
    max_store: Option<Limit>,
    /// Memory that may be mapped from there.
    #[arg(long, value_name = "SIZE|none", value_parser = parse_limit, group = "limits")]
    max_overlays: Option<Limit>,
    /// Memory added to there in a second, at least 256K.
    #[arg(long, value_name = "SIZE|none", value_parser = parse_rate, group = "limits")]
    publish_rate: Option<Limit>,
    /// Shares, or only counts what that would bring.
    #[arg(long, value_parser = or_inherit::<Mode>(), conflicts_with = "vm")]
    mode: Option<Choice<Mode>>,
    /// Shares always, or only from when on the host is short of memory.
    #[arg(long, value_parser = or_inherit::<Policy>(), conflicts_with = "vm")]
    policy: Option<Choice<Policy>>,
    /// Splits huge pages of guests to share what is in them: never, when an eighth of one could be
    /// shared, or always.
    #[arg(long, value_parser = or_inherit::<SplitHugePages>(), conflicts_with = "vm")]
    split_huge_pages: Option<Choice<SplitHugePages>>,
}

impl From<LimitArguments> for (LimitChanges, PolicyChanges) {
    fn from(arguments: LimitArguments) -> Self {
        let LimitArguments {
            max_store,
            max_overlays,
            publish_rate,
            mode,
            policy,
            split_huge_pages,
        } = arguments;
        let limits = LimitChanges {
            max_store,
            max_overlays,
            publish_rate,
        };
        let policy = PolicyChanges {
            mode,
            policy,
            split_huge_pages,
        };
        (limits, policy)
    }
}

/// One of the values, or that a group has none of its own.
fn or_inherit<T>() -> impl TypedValueParser<Value = Choice<T>>
where
    T: ValueEnum + Send + Sync + 'static,
{
    let own = T::value_variants().iter();
    let own = own.filter_map(ValueEnum::to_possible_value);
    let inherit = PossibleValue::new(INHERIT).help("As set for all; of all: the default");
    PossibleValuesParser::new(own.chain([inherit]))
        .map(|word| T::from_str(&word, false).map_or(Choice::Inherit, Choice::Own))
}

fn parse_rate(text: &str) -> Result<Limit, String> {
    match text {
        "none" | INHERIT => Ok(Limit::None),
        // The daemon knows the least.
        _ => parse_size(text).map(Limit::Bytes),
    }
}

fn parse_limit(text: &str) -> Result<Limit, String> {
    match text {
        "none" | INHERIT => Ok(Limit::None),
        _ => parse_memory(text).map(Limit::Bytes),
    }
}

impl From<ScopeArguments> for Scope {
    fn from(arguments: ScopeArguments) -> Self {
        match arguments {
            ScopeArguments {
                group: Some(group), ..
            } => Scope::Group(group),
            ScopeArguments { vm: Some(vm), .. } => Scope::Vm(vm),
            _ => Scope::All,
        }
    }
}

/// What `--file` and `--gfn` choose.
pub(crate) fn selection(file: Option<String>, frames: Option<(u64, u64)>) -> Selection {
    match (file, frames) {
        (Some(file), _) => Selection::File(file),
        (None, Some((gfn, pages))) => Selection::Pages { gfn, pages },
        (None, None) => Selection::All,
    }
}

fn parse_frames(text: &str) -> Result<(u64, u64), String> {
    let number = |text: &str| match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    let (first, count) = text.split_once('+').unwrap_or((text, "1"));
    match (number(first), number(count)) {
        (Ok(first), Ok(count)) if count > 0 => Ok((first, count)),
        _ => Err("a frame number, or FIRST+COUNT; 0x… is hexadecimal".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_holds_together() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn frames_are_one_or_several() {
        assert_eq!(parse_frames("17"), Ok((17, 1)));
        assert_eq!(parse_frames("0x100+16"), Ok((256, 16)));
        for text in ["", "x", "1+", "+1", "-1", "1+0"] {
            assert!(parse_frames(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_limit_for_each_vm_is_a_limit() {
        let parse = |words: &str| Arguments::try_parse_from(words.split(' '));
        assert!(parse("pagefusionctl set --all --each-vm --max-store 1G").is_ok());
        assert!(parse("pagefusionctl set --all --each-vm --mode share").is_err());
        // As `explain` proposes it.
        assert!(parse("pagefusionctl set --vm a --max-store 1G --max-overlays 1G").is_ok());
        assert!(parse("pagefusionctl set --all --mode share").is_ok());
        assert!(parse("pagefusionctl set --all").is_err());
        // The unit was forgotten.
        let refused = parse("pagefusionctl set --all --max-store 4").unwrap_err();
        assert!(refused.to_string().contains("4G"), "{refused}");
    }

    #[test]
    fn what_was_set_can_be_taken_back() {
        let set = |words: &str| {
            let words = format!("pagefusionctl set {words}");
            match Arguments::try_parse_from(words.split(' ')).unwrap().command {
                Command::Set { limits, .. } => <(LimitChanges, PolicyChanges)>::from(limits),
                other => panic!("{other:?}"),
            }
        };
        let (_, policy) = set("--group g --mode inherit --split-huge-pages never");
        assert_eq!(policy.mode, Some(Choice::Inherit));
        assert_eq!(policy.policy, None);
        let never = Choice::Own(SplitHugePages::Never);
        assert_eq!(policy.split_huge_pages, Some(never));
        for word in ["none", "inherit"] {
            let (limits, _) = set(&format!("--vm a --max-store {word} --publish-rate {word}"));
            let none = Some(Limit::None);
            assert_eq!((limits.max_store, limits.publish_rate), (none, none));
        }
    }

    #[test]
    fn frames_belong_to_a_vm() {
        let parse = |words: &str| Arguments::try_parse_from(words.split(' '));
        assert!(parse("pagefusionctl undo --vm a --gfn 1").is_ok());
        assert!(parse("pagefusionctl undo --all --gfn 1").is_err());
        assert!(parse("pagefusionctl undo --vm a --gfn 1 --file b").is_err());
        assert!(parse("pagefusionctl undo").is_err());
        assert!(parse("pagefusionctl undo --all --vm a").is_err());
    }
}
