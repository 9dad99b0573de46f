//! The harness: `demo` shows that memory is saved, `test` that nothing breaks.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use qemu_tests::{
    artifacts::Artifacts,
    bench::{
        self,
        compare::{self, Compare},
    },
    demo,
    guest::Accelerator,
    interrupt, kvm,
    lab::{self, Lab},
    progress,
    report::Report,
    scenarios::{self, Tier},
    services::Load,
    suite::{self, Choice, Tally, Verdict},
    world::Host,
};

#[derive(Debug, Parser)]
#[command(about = "Boots real guests, shares their memory and checks that nothing breaks")]
struct Arguments {
    /// What provisioning made (JSON).
    #[arg(
        long,
        global = true,
        default_value = "target/pagefusion/artifacts.json"
    )]
    artifacts: PathBuf,
    /// Keep consoles and logs in this directory.
    #[arg(long, global = true)]
    logs: Option<PathBuf>,
    /// The host is itself a machine under TCG; everything may take longer.
    #[arg(long, global = true, hide = true)]
    nested: bool,
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Boot guests, share their memory, prove it from outside.
    Demo {
        /// How many guests.
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(2..=64))]
        vms: u32,
        /// Where the guests run.
        #[arg(long, value_enum, default_value_t = HostKind::Tcg)]
        host: HostKind,
        /// Fewer services in smaller guests.
        #[arg(long)]
        light: bool,
        /// Write the result to this file.
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// Run the scenarios, one verdict line for each.
    Test {
        /// Leave out the slow hosts.
        #[arg(long)]
        quick: bool,
        /// Only on this kind of host.
        #[arg(long, value_enum)]
        host: Option<HostKind>,
        /// How much to run.
        #[arg(long, value_enum, default_value_t = Tier::Usual)]
        tier: Tier,
        /// Only scenarios whose name contains one of these, of whatever tier.
        filters: Vec<String>,
    },
    /// Measure pagefusion against KSM, and both against what could be shared.
    Bench {
        /// Where the guests run.
        #[arg(long, value_enum, default_value_t = HostKind::Tcg)]
        host: HostKind,
        #[command(flatten)]
        compare: Compare,
    },
    /// Write the tables and plots of results into a document.
    BenchDocument {
        /// The results.
        json: PathBuf,
        /// The document.
        document: PathBuf,
    },
    /// Measure what the module costs a guest, in instructions.
    BenchGuest {
        /// Fewer and smaller loads.
        #[arg(long)]
        quick: bool,
        /// Write the result to this file.
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// Boot the lab host and run the harness in it with these arguments.
    LabHost {
        /// For the harness inside.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Say whether this machine can run KVM guests.
    ProbeKvm,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum HostKind {
    /// This machine, guests under QEMU's translator.
    Tcg,
    /// The same with the oldest QEMU that is tested.
    #[value(name = "qemu-7.2")]
    OlderQemu,
    /// A lab host under TCG with emulated virtualisation, KVM guests in it.
    KvmLab,
    /// This machine, KVM guests.
    Kvm,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("qemu-tests: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<ExitCode> {
    interrupt::install()?;
    if let Task::BenchDocument { json, document } = &arguments.task {
        compare::document(&compare::read(json)?, document)?;
        return Ok(ExitCode::SUCCESS);
    }
    if arguments.nested {
        progress::beat();
    }
    let artifacts = Artifacts::read(&arguments.artifacts)?;
    let logs = arguments.logs.as_deref();
    let harness = Harness {
        artifacts: &artifacts,
        logs,
        nested: arguments.nested,
    };
    match arguments.task {
        Task::Demo {
            vms,
            host,
            light,
            json,
        } => {
            let load = if light { Load::Light } else { Load::Whole };
            harness.demo(vms, host, load, json.as_deref())
        }
        Task::Test {
            quick,
            host,
            tier,
            filters,
        } => {
            let filters = &filters;
            let choice = Choice {
                tier,
                filters,
                among: None,
            };
            harness.test(quick, host, choice)
        }
        Task::Bench { host, compare } => harness.compare(host, &compare),
        Task::BenchDocument { .. } => unreachable!("has been done"),
        Task::BenchGuest { quick, json } => harness.bench_guest(quick, json.as_deref()),
        Task::LabHost { arguments } => {
            let mut lab = Lab::start(&artifacts, logs)?;
            let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
            let status = lab.run(&arguments, |line| println!("{line}"))?;
            Ok(ExitCode::from(u8::try_from(status).unwrap_or(1)))
        }
        Task::ProbeKvm => {
            kvm::probe(&artifacts)?;
            println!("KVM guests run on this machine");
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// What every task needs.
#[derive(Clone, Copy, Debug)]
struct Harness<'a> {
    artifacts: &'a Artifacts,
    logs: Option<&'a Path>,
    nested: bool,
}

impl Harness<'_> {
    fn demo(self, vms: u32, host: HostKind, load: Load, json: Option<&Path>) -> Result<ExitCode> {
        let report = self.report(vms, host, load)?;
        println!("{}", report.table());
        write_json(json, &report)?;
        match self.nested || host == HostKind::KvmLab {
            true => demo::nested_verdict(&report)?,
            false => demo::verdict(&report)?,
        }
        Ok(ExitCode::SUCCESS)
    }

    fn compare(self, host: HostKind, compare: &Compare) -> Result<ExitCode> {
        let here = |accelerator| {
            let host = self.host(accelerator);
            compare::run(self.artifacts, compare, host, self.logs)
        };
        let results = match host {
            HostKind::Tcg => here(Accelerator::Tcg)?,
            HostKind::OlderQemu => compare::run(
                &self.older()?,
                compare,
                self.host(Accelerator::Tcg),
                self.logs,
            )?,
            HostKind::Kvm => {
                kvm::probe(self.artifacts)?;
                here(Accelerator::Kvm)?
            }
            HostKind::KvmLab => self.compare_in_lab(compare)?,
        };
        println!("{}", compare::tables(&results));
        Ok(ExitCode::SUCCESS)
    }

    fn compare_in_lab(self, compare: &Compare) -> Result<compare::Results> {
        const RESULTS: &str = "/tmp/results.json";
        let more = compare.arguments()?;
        eprintln!("boot a lab host with emulated virtualisation");
        let mut lab = Lab::start(self.artifacts, self.logs)?;
        let mut arguments = vec!["bench", "--host", "kvm", "--json", RESULTS];
        arguments.extend(more.iter().map(String::as_str));
        let mut last = String::new();
        let status = lab.run(&arguments, relay(&mut last))?;
        ensure!(
            status == 0,
            "the benchmark in the lab ended with {status}: {last}"
        );
        compare::adopt(compare, &lab.read(RESULTS)?)
    }

    fn bench_guest(self, quick: bool, json: Option<&Path>) -> Result<ExitCode> {
        let table = bench::guest(self.artifacts, quick, self.logs)?;
        println!("{}", table.text());
        write_json(json, &table)?;
        Ok(ExitCode::SUCCESS)
    }

    fn report(self, vms: u32, host: HostKind, load: Load) -> Result<Report> {
        let here = |accelerator| {
            let host = self.host(accelerator);
            demo::run(self.artifacts, host, vms, load, self.logs)
        };
        match host {
            HostKind::Tcg => here(Accelerator::Tcg),
            HostKind::OlderQemu => {
                let host = self.host(Accelerator::Tcg);
                demo::run(&self.older()?, host, vms, load, self.logs)
            }
            HostKind::Kvm => {
                kvm::probe(self.artifacts)?;
                here(Accelerator::Kvm)
            }
            HostKind::KvmLab => report_from(&mut self.start_lab()?, vms, load),
        }
    }

    fn start_lab(self) -> Result<Lab> {
        eprintln!("boot a lab host with emulated virtualisation");
        Lab::start(self.artifacts, self.logs)
    }

    fn test(self, quick: bool, only: Option<HostKind>, choice: Choice<'_>) -> Result<ExitCode> {
        let mut tally = Tally::default();
        let wanted =
            |host: HostKind| only.map_or(host == HostKind::Tcg || !quick, |only| only == host);
        self.test_here(&wanted, choice, &mut tally)?;
        // By itself: what is emulated twice and gets half a CPU looks like a machine that hangs.
        if wanted(HostKind::KvmLab) {
            self.test_in_lab(choice, &mut tally)?;
        }
        println!("{}", tally.line());
        Ok(if tally.good() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }

    /// The scenarios of this machine.
    fn test_here(
        self,
        wanted: &dyn Fn(HostKind) -> bool,
        choice: Choice<'_>,
        tally: &mut Tally,
    ) -> Result<()> {
        if wanted(HostKind::Tcg) {
            let host = self.host(Accelerator::Tcg);
            suite::run(host.name(), self.artifacts, host, choice, self.logs, tally)?;
        }
        if wanted(HostKind::OlderQemu) {
            self.test_with_older_qemu(choice, tally)?;
        }
        if wanted(HostKind::Kvm) {
            let start = Instant::now();
            if let Err(error) = kvm::probe(self.artifacts) {
                let verdict = Verdict::Skipped(format!("{error:#}"));
                tally.record("kvm", "all_scenarios", &verdict, start.elapsed());
            } else {
                let host = self.host(Accelerator::Kvm);
                suite::run(host.name(), self.artifacts, host, choice, self.logs, tally)?;
            }
        }
        Ok(())
    }

    fn test_with_older_qemu(self, choice: Choice<'_>, tally: &mut Tally) -> Result<()> {
        const NAME: &str = "qemu-7.2";
        let artifacts = match self.older() {
            Ok(artifacts) => artifacts,
            Err(error) => {
                let verdict = Verdict::Skipped(format!("{error:#}"));
                tally.record(NAME, "all_scenarios", &verdict, Duration::ZERO);
                return Ok(());
            }
        };
        let choice = Choice {
            among: Some(scenarios::WITH_AN_OLDER_QEMU),
            ..choice
        };
        let version = artifacts.qemu_version()?;
        ensure!(
            version.starts_with("7.2."),
            "the older QEMU says that it is {version}"
        );
        let host = self.host(Accelerator::Tcg);
        // Logs are called after guests, which are called as those with the other QEMU.
        let logs = self.logs.map(|logs| logs.join(NAME));
        suite::run(NAME, &artifacts, host, choice, logs.as_deref(), tally)
    }

    /// What is run on the nested KVM host, one after the other; what fails may have broken that host.
    fn test_in_lab(self, choice: Choice<'_>, tally: &mut Tally) -> Result<()> {
        let own: [(&str, Tier, RunInLab); 2] = [
            ("the_example_shares", Tier::Usual, example_in_lab),
            ("main_scenario", Tier::Usual, main_scenario_in_lab),
        ];
        let ordinary = lab::SCENARIOS.map(|name| (name, Tier::Deep, scenario_in_lab as RunInLab));
        let all = own.into_iter().chain(ordinary);
        let mut lab = None;
        for (name, _, run) in all.filter(|(name, tier, _)| choice.wants_called(name, *tier)) {
            let start = Instant::now();
            let verdict = if self.artifacts.lab_image.is_none() {
                Verdict::Skipped("there is no image of the lab host".to_owned())
            } else {
                self.play_in_lab(&mut lab, name, run)
                    .unwrap_or_else(|error| Verdict::Failed(format!("{error:#}")))
            };
            interrupt::check()?;
            tally.record("kvm-lab", name, &verdict, start.elapsed());
        }
        Ok(())
    }

    /// Leaves the lab host when all went well.
    fn play_in_lab(self, lab: &mut Option<Lab>, name: &str, run: RunInLab) -> Result<Verdict> {
        let mut running = match lab.take() {
            Some(running) => running,
            None => self.start_lab()?,
        };
        let verdict = run(self.artifacts, &mut running, name)?;
        *lab = Some(running);
        Ok(verdict)
    }

    /// The same artifacts with the oldest QEMU that is tested.
    fn older(self) -> Result<Artifacts> {
        let artifacts = self.artifacts.with_older_qemu();
        artifacts.context("there is no older QEMU; provision the machine again")
    }

    fn host(self, accelerator: Accelerator) -> Host {
        Host {
            accelerator,
            nested: self.nested,
        }
    }
}

/// Runs what is called so on a lab host.
type RunInLab = fn(&Artifacts, &mut Lab, &str) -> Result<Verdict>;

/// One that is written for any host.
fn scenario_in_lab(_: &Artifacts, lab: &mut Lab, name: &str) -> Result<Verdict> {
    let mut said = String::new();
    let status = lab.run(&["test", "--host", "kvm", name], |line| {
        said.push('\n');
        said.push_str(line);
    })?;
    ensure!(status == 0, "the harness in the lab says:{said}");
    Ok(Verdict::Passed)
}

/// The VMM that the library's pages show.
fn example_in_lab(artifacts: &Artifacts, lab: &mut Lab, _: &str) -> Result<Verdict> {
    if !Lab::has_example(artifacts) {
        return Ok(Verdict::Skipped(
            "cargo build --release -p pagefusion-host --example two_guests was not run".to_owned(),
        ));
    }
    let mut last = String::new();
    let status = lab.run_example(relay(&mut last))?;
    ensure!(status == 0, "it ended with {status}: {last}");
    Ok(Verdict::Passed)
}

fn main_scenario_in_lab(_: &Artifacts, lab: &mut Lab, _: &str) -> Result<Verdict> {
    let report = report_from(lab, 2, Load::Light)?;
    demo::nested_verdict(&report).map(|()| Verdict::Passed)
}

/// Shows what the lab says, and keeps its last words in `last`.
fn relay(last: &mut String) -> impl FnMut(&str) {
    move |line| {
        eprintln!("lab: {line}");
        if !line.trim().is_empty() {
            line.clone_into(last);
        }
    }
}

/// The demo inside the lab host.
fn report_from(lab: &mut Lab, vms: u32, load: Load) -> Result<Report> {
    const REPORT: &str = "/tmp/report.json";
    let vms = vms.to_string();
    let mut arguments = vec!["demo", "--host", "kvm", "--vms", &vms, "--json", REPORT];
    if load == Load::Light {
        arguments.push("--light");
    }
    let mut last = String::new();
    let status = lab.run(&arguments, relay(&mut last))?;
    // A report that is there speaks for itself; without one the last line says why.
    match lab.read(REPORT) {
        Ok(text) => serde_json::from_str(&text).context("parse the lab's report"),
        Err(_) => anyhow::bail!("the demo in the lab ended with {status}: {last}"),
    }
}

fn write_json(path: Option<&Path>, value: &impl serde::Serialize) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    let text = serde_json::to_string_pretty(value)? + "\n";
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}
