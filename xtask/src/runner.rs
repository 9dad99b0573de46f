//! `test`, `demo` and `check`: cargo and the QEMU harness, one after the other.

use std::{
    ffi::{OsStr, OsString},
    io::{BufRead, BufReader},
    path::Path,
    process::{ChildStdout, Command, ExitCode, ExitStatus, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use crate::{
    counts::Counts,
    kernel::{DEBUG, SECOND, USUAL},
    library, module,
    process::{bound_in_group, cargo_program, stop_if_interrupted},
    provision::Project,
    watched,
};

/// Set for tests that can try harder when there is time.
const DEEP: &str = "PAGEFUSION_DEEP_TESTS";
/// What a runner has written before it ended has been read when nothing has come for so long.
const QUIET: Duration = Duration::from_millis(500);

#[derive(Debug, clap::Args)]
pub(crate) struct DemoArguments {
    /// How many guests share their memory
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(2..=64))]
    vms: u32,
    /// Where the guests run: in emulation here, in that of an older QEMU, in KVM inside an emulated machine, or in KVM here
    #[arg(long, default_value = "tcg", value_parser = ["tcg", "qemu-7.2", "kvm-lab", "kvm"])]
    host: String,
    /// Also write the results to this file
    #[arg(long, value_name = "FILE")]
    json: Option<std::path::PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct TestArguments {
    /// Leave out the slow hosts
    #[arg(long)]
    quick: bool,
    /// Try harder and longer, on a second kernel and on one with detectors as well
    #[arg(long, conflicts_with = "quick")]
    deep: bool,
    /// Run the QEMU tests of this kind of host only
    #[arg(long, value_parser = ["tcg", "qemu-7.2", "kvm-lab", "kvm"])]
    host: Option<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct BenchArguments {
    /// Less and smaller: under five minutes
    #[arg(long)]
    quick: bool,
    /// Also write the results to this file, after every run
    #[arg(long, value_name = "FILE")]
    json: Option<std::path::PathBuf>,
    /// Further arguments of `qemu-tests bench`, after `--`: what to measure
    #[arg(last = true)]
    more: Vec<OsString>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct GuestBenchArguments {
    /// Fewer and smaller loads
    #[arg(long)]
    quick: bool,
    /// Also write the results to this file
    #[arg(long, value_name = "FILE")]
    json: Option<std::path::PathBuf>,
}

pub(crate) fn demo(project: &Project, arguments: &DemoArguments) -> Result<ExitCode> {
    let artifacts = project.everything()?;
    build_release(project)?;
    let mut command = harness(project, "demo", &artifacts);
    command
        .arg("--vms")
        .arg(arguments.vms.to_string())
        .arg("--host")
        .arg(&arguments.host);
    if let Some(json) = &arguments.json {
        command.arg("--json").arg(std::path::absolute(json)?);
    }
    let status = command.status().context("cannot start qemu-tests")?;
    stop_if_interrupted()?;
    Ok(exit_code(status))
}

pub(crate) fn bench(project: &Project, arguments: &BenchArguments) -> Result<ExitCode> {
    let artifacts = project.everything()?;
    build_release(project)?;
    let mut command = harness(project, "bench", &artifacts);
    if arguments.quick {
        command.arg("--quick");
    }
    if let Some(json) = &arguments.json {
        command.arg("--json").arg(std::path::absolute(json)?);
    }
    command.args(&arguments.more);
    let status = command.status().context("cannot start qemu-tests")?;
    stop_if_interrupted()?;
    Ok(exit_code(status))
}

/// Nothing is measured for it, so nothing need be there but the harness.
pub(crate) fn bench_document(project: &Project, json: &Path, document: &Path) -> Result<ExitCode> {
    let mut command = cargo(project);
    command
        .args(["run", "--quiet", "--package", "qemu-tests", "--"])
        .arg("bench-document")
        .arg(std::path::absolute(json)?)
        .arg(std::path::absolute(document)?);
    let status = command.status().context("cannot start qemu-tests")?;
    stop_if_interrupted()?;
    Ok(exit_code(status))
}

pub(crate) fn bench_guest(project: &Project, arguments: &GuestBenchArguments) -> Result<ExitCode> {
    let artifacts = project.everything()?;
    build_release(project)?;
    let mut command = harness(project, "bench-guest", &artifacts);
    if arguments.quick {
        command.arg("--quick");
    }
    if let Some(json) = &arguments.json {
        command.arg("--json").arg(std::path::absolute(json)?);
    }
    let status = command.status().context("cannot start qemu-tests")?;
    stop_if_interrupted()?;
    Ok(exit_code(status))
}

/// One run of the QEMU harness.
#[derive(Debug, PartialEq, Eq)]
struct Run<'a> {
    kernel: &'static str,
    tier: &'static str,
    quick: bool,
    host: Option<&'a str>,
}

impl<'a> Run<'a> {
    const DETECTORS: Self = Self {
        kernel: DEBUG,
        tier: "debug",
        quick: true,
        host: Some("tcg"),
    };

    /// Those that `arguments` ask for, when `kernel` is the one chosen.
    fn plan(kernel: &'static str, arguments: &'a TestArguments) -> Vec<Self> {
        let host = arguments.host.as_deref();
        if kernel == DEBUG {
            return vec![Self {
                host: Some(host.unwrap_or("tcg")),
                ..Self::DETECTORS
            }];
        }
        let mut runs = vec![Self {
            kernel,
            tier: if arguments.deep { "deep" } else { "usual" },
            quick: arguments.quick,
            host,
        }];
        // Other kernels say nothing new about a host.
        if kernel == USUAL && arguments.deep && host.is_none() {
            runs.push(Self {
                kernel: SECOND,
                tier: "smoke",
                quick: true,
                host: Some("tcg"),
            });
            runs.push(Self::DETECTORS);
        }
        runs
    }

    /// Whether the nested host is part of it.
    fn is_in_lab(&self) -> bool {
        self.host.map_or(!self.quick, |host| host == "kvm-lab")
    }

    fn command(&self, project: &Project, artifacts: &Path) -> Command {
        let mut command = harness(project, "test", artifacts);
        command.args(["--tier", self.tier]);
        if let Some(host) = self.host {
            command.args(["--host", host]);
        } else if self.quick {
            command.arg("--quick");
        }
        command
    }
}

pub(crate) fn test(project: &Project, arguments: &TestArguments) -> Result<ExitCode> {
    let plan = Run::plan(project.kernel.series, arguments);
    let began = Instant::now();
    let mut artifacts = Vec::new();
    for run in &plan {
        artifacts.push(project.with_kernel(run.kernel)?.everything()?);
    }
    let mut times = vec![("making what is needed".to_owned(), began.elapsed())];
    let mut total = Counts::default();

    let mut unit = cargo(project);
    unit.args(["test", "--workspace", "--no-fail-fast"]);
    if arguments.deep {
        unit.env(DEEP, "1");
    }
    let start = Instant::now();
    total += counted("cargo test", &mut unit, Tally::Sum)?;
    times.push(("unit tests".to_owned(), start.elapsed()));
    if arguments.deep {
        for tests in watched::ALL {
            println!("{}:", tests.what);
            if let Some(reason) = tests.missing() {
                println!("skipped: {reason}");
                total += Counts::ONE_SKIPPED;
                continue;
            }
            let start = Instant::now();
            let start_in = |program: &OsStr| in_checkout(project, program);
            let mut command = tests.command(start_in, &project.checkout, &project.target_dir());
            total += counted(tests.what, &mut command, Tally::Sum)?;
            times.push((tests.what.to_owned(), start.elapsed()));
        }
    }

    // Also when unit tests failed: one run should show all there is to see.
    let in_lab = plan.iter().any(Run::is_in_lab);
    let built = build_release(project).and_then(|()| {
        if in_lab {
            build(project, &EXAMPLE)
        } else {
            Ok(())
        }
    });
    match built {
        Ok(()) => {
            for (run, artifacts) in plan.iter().zip(&artifacts) {
                let what = format!("{} scenarios on kernel {}", run.tier, run.kernel);
                println!("{what}:");
                let start = Instant::now();
                let mut command = run.command(project, artifacts);
                total += counted("qemu-tests", &mut command, Tally::Last)?;
                times.push((what, start.elapsed()));
            }
        }
        Err(error) => {
            stop_if_interrupted()?;
            eprintln!("error: {error:#}");
            total += Counts::ONE_FAILED;
        }
    }

    for (what, took) in times {
        println!("{:>8.1} s  {what}", took.as_secs_f64());
    }
    println!("{total}");
    Ok(if total.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Everything that can be found without running the code.
pub(crate) fn check(project: &Project) -> Result<ExitCode> {
    let mut failed = Vec::new();
    let mut run = |name: &'static str, command: &mut Command| -> Result<()> {
        eprintln!("{name} ...");
        let status = command
            .status()
            .with_context(|| format!("cannot start {name}"))?;
        stop_if_interrupted()?;
        if !status.success() {
            failed.push(name);
        }
        Ok(())
    };
    run(
        "cargo fmt",
        cargo(project).args(["fmt", "--all", "--check"]),
    )?;
    // No package has those of its files that need the kernel.
    run(
        "rustfmt of the module",
        Command::new("rustfmt")
            .args(["--check", "--edition", "2021", "module/main.rs"])
            .current_dir(&project.checkout),
    )?;
    run(
        "cargo clippy",
        cargo(project).args([
            "clippy",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ]),
    )?;
    run(
        "cargo doc",
        cargo(project)
            .args([
                "doc",
                "--workspace",
                "--no-deps",
                "--document-private-items",
            ])
            .env("RUSTDOCFLAGS", "-D warnings"),
    )?;
    for (name, mut command) in library::lints(|| cargo(project)) {
        run(name, &mut command)?;
    }
    let has_deny = cargo(project)
        .args(["deny", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if has_deny {
        run("cargo deny", cargo(project).args(["deny", "check"]))?;
    } else {
        eprintln!("cargo deny: skipped, it is not installed (cargo install cargo-deny)");
    }
    if let Err(error) = library::check_dependencies(cargo(project)) {
        stop_if_interrupted()?;
        eprintln!("error: {error:#}");
        failed.push("the library's dependencies");
    }
    if let Err(error) = lint_module(project) {
        stop_if_interrupted()?;
        eprintln!("error: {error:#}");
        failed.push("the module's clippy");
    }
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("failed: {}", failed.join(", "));
    Ok(ExitCode::FAILURE)
}

pub(crate) fn lint_module(project: &Project) -> Result<()> {
    crate::host_packages::provision(&project.cache)?;
    module::lint(&project.cache, &project.checkout, &project.build_root()?)
}

/// The library's example, which the nested host runs.
const EXAMPLE: [&str; 6] = [
    "build",
    "--release",
    "--package",
    "pagefusion-host",
    "--example",
    "two_guests",
];

/// The programs that run on hosts and in guests.
fn build_release(project: &Project) -> Result<()> {
    let workspace = ["build", "--release", "--workspace", "--exclude", "xtask"];
    build(project, &workspace)?;
    // Alone in an initramfs, the guests' first program has no shared libraries.
    build(
        project,
        &[
            "rustc",
            "--quiet",
            "--release",
            "--package",
            "qemu-tests",
            "--bin",
            "pf-init",
            "--",
            "-C",
            "target-feature=+crt-static",
        ],
    )
}

fn build(project: &Project, arguments: &[&str]) -> Result<()> {
    let status = cargo(project)
        .args(arguments)
        .status()
        .context("cannot start cargo")?;
    stop_if_interrupted()?;
    anyhow::ensure!(status.success(), "the workspace does not build");
    Ok(())
}

fn cargo(project: &Project) -> Command {
    in_checkout(project, &cargo_program())
}

fn in_checkout(project: &Project, program: &OsStr) -> Command {
    let mut command = bound_in_group(program);
    command.current_dir(&project.checkout);
    command
}

fn harness(project: &Project, task: &str, artifacts: &Path) -> Command {
    let mut command = bound_in_group(project.bin_dir().join("qemu-tests"));
    command
        .arg(task)
        .arg("--artifacts")
        .arg(artifacts)
        .current_dir(&project.checkout);
    command
}

/// How the counts that a runner prints add up.
#[derive(Debug, Clone, Copy)]
enum Tally {
    /// One line for each of its parts.
    Sum,
    /// The last line is for all of it.
    Last,
}

/// Runs `command`, passes its output on, and counts. A failure that no count tells of is one more failed test.
fn counted(what: &str, command: &mut Command, tally: Tally) -> Result<Counts> {
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {what}"))?;
    let mut counts = Counts::default();
    let mut any = false;
    let lines = child.stdout.take().map(lines);
    while let Some(lines) = &lines {
        let text = match lines.recv_timeout(QUIET) {
            Ok(text) => text,
            // A test that failed may have left a process behind, which has the other end of it, too.
            Err(RecvTimeoutError::Timeout) if child.try_wait()?.is_some() => break,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => break,
        };
        print!("{text}");
        if let Some(of_line) = Counts::of_line(&text) {
            any = true;
            match tally {
                Tally::Sum => counts += of_line,
                Tally::Last => counts = of_line,
            }
        }
    }
    let status = child.wait()?;
    stop_if_interrupted()?;
    Ok(judge(what, counts, any, status.success()))
}

/// What comes from `output`, line by line.
fn lines(output: ChildStdout) -> Receiver<String> {
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        let mut reader = BufReader::new(output);
        let mut line = Vec::new();
        while reader
            .read_until(b'\n', &mut line)
            .is_ok_and(|read| read > 0)
        {
            let text = String::from_utf8_lossy(&line).into_owned();
            if sender.send(text).is_err() {
                return;
            }
            line.clear();
        }
    });
    lines
}

fn judge(what: &str, mut counts: Counts, any: bool, success: bool) -> Counts {
    if !success && counts.failed == 0 {
        eprintln!("error: {what} failed without naming a test");
        counts += Counts::ONE_FAILED;
    } else if !any {
        eprintln!("error: {what} ran no test");
        counts += Counts::ONE_FAILED;
    }
    counts
}

fn exit_code(status: ExitStatus) -> ExitCode {
    status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .map_or(ExitCode::FAILURE, ExitCode::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, tally: Tally) -> Counts {
        counted("sh", Command::new("sh").args(["-c", script]), tally).unwrap()
    }

    #[test]
    fn a_runner_that_fails_without_a_count_is_a_failed_test() {
        assert_eq!(shell("exit 1", Tally::Sum).failed, 1);
        assert_eq!(
            shell("echo 3 passed, 0 failed, 0 skipped; exit 1", Tally::Last),
            Counts {
                passed: 3,
                failed: 1,
                skipped: 0
            }
        );
    }

    #[test]
    fn a_process_that_is_left_behind_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let end = directory.path().join("end");
        let path = end.display();
        // It ends when somebody has opened the file for writing.
        let counts = "test result: ok. 3 passed; 0 failed; 0 ignored";
        let script = format!("mkfifo {path}; cat < {path} & echo '{counts}'");
        assert_eq!(shell(&script, Tally::Sum).passed, 3);
        drop(std::fs::OpenOptions::new().write(true).open(end).unwrap());
    }

    #[test]
    fn only_a_deep_test_of_everything_takes_other_kernels() {
        let kernels = |kernel, quick, deep, host: Option<&str>| -> Vec<_> {
            let host = host.map(str::to_owned);
            let arguments = TestArguments { quick, deep, host };
            let plan = Run::plan(kernel, &arguments);
            plan.iter().map(|run| (run.kernel, run.tier)).collect()
        };
        assert_eq!(kernels(USUAL, true, false, None), [(USUAL, "usual")]);
        assert_eq!(kernels(SECOND, false, true, None), [(SECOND, "deep")]);
        assert_eq!(kernels(DEBUG, false, false, None), [(DEBUG, "debug")]);
        assert_eq!(kernels(USUAL, false, true, Some("kvm")), [(USUAL, "deep")]);
        assert_eq!(
            kernels(USUAL, false, true, None),
            [(USUAL, "deep"), (SECOND, "smoke"), (DEBUG, "debug")]
        );
    }

    #[test]
    fn the_nested_host_is_part_of_a_test_that_is_not_quick_or_names_it() {
        let in_lab = |kernel, quick, host: Option<&str>| {
            let (host, deep) = (host.map(str::to_owned), false);
            let arguments = TestArguments { quick, deep, host };
            Run::plan(kernel, &arguments).iter().any(Run::is_in_lab)
        };
        assert!(in_lab(USUAL, false, None));
        assert!(in_lab(USUAL, true, Some("kvm-lab")));
        assert!(!in_lab(USUAL, true, None));
        assert!(!in_lab(USUAL, false, Some("tcg")));
        assert!(!in_lab(USUAL, false, Some("qemu-7.2")));
        assert!(!in_lab(DEBUG, false, None));
    }

    #[test]
    fn a_runner_that_says_nothing_did_not_pass() {
        assert_eq!(shell("true", Tally::Last).failed, 1);
    }

    #[test]
    fn parts_are_added_and_totals_are_not() {
        let script = "for i in 1 2; do echo 2 passed, 0 failed, 1 skipped; done";
        assert_eq!(shell(script, Tally::Sum).passed, 4);
        assert_eq!(shell(script, Tally::Last).passed, 2);
    }
}
