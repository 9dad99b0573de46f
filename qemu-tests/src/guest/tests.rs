//! With a shell script in place of QEMU.

use super::*;

/// Finds the agent's end among its arguments, answers the first request as `then` says.
const MACHINE: &str = r#"
for word; do case $word in *id=pf-agent,fd=*) port=${word##*fd=} ;; esac; done
say() { printf '%s\n' "$1" >&"$port"; }
line() { say '{"type":"output","id":1,"line":"'"$1"'","stderr":false}'; }
answer() { say '{"type":"reply","id":1,"ok":{"status":0,"timed_out":false,"stdout":"","stderr":""},"error":null}'; }
read -r request <&"$port"
"#;
const SILENCE: Duration = Duration::from_secs(5);

/// What comes of a streaming request to a machine that does `then`, and the lines it sent.
fn stream(then: &str) -> (Result<RunOutcome>, Vec<String>) {
    let logs = tempfile::tempdir().unwrap();
    let config = Config {
        name: "script".into(),
        mode: Mode::Agent,
        accelerator: Accelerator::Tcg,
        memory_mib: 1,
        cpus: 1,
        cpu: "max",
        kernel: "/k".into(),
        initramfs: "/i".into(),
        disks: vec![],
        kernel_arguments: String::new(),
        arguments: vec![],
    };
    let mut launcher = Command::new("bash");
    launcher.args(["-c", &format!("{MACHINE}{then}"), "qemu"]);
    let mut guest = Guest::start(&config, launcher, None, logs.path()).unwrap();
    let mut lines = Vec::new();
    let limit = Duration::from_secs(60);
    let outcome = guest.stream(vec!["a".into()], limit, SILENCE, |line| {
        lines.push(line.to_owned());
    });
    (outcome, lines)
}

#[test]
fn a_machine_that_goes_silent_is_given_up_long_before_its_limit() {
    let (outcome, lines) = stream("line one; read -r forever <&\"$port\"");
    let text = outcome.unwrap_err().to_string();
    assert!(text.contains("nothing for 5s"), "{text}");
    assert_eq!(lines, ["one"]);
}

#[test]
fn a_machine_that_speaks_may_take_longer_than_its_silence() {
    let (outcome, lines) =
        stream("for n in 1 2 3; do sleep 2; line $n; done; answer; read -r forever <&\"$port\"");
    assert_eq!(outcome.unwrap().status, Some(0));
    assert_eq!(lines, ["1", "2", "3"]);
}
