// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The log of a program, for people or for programs.

use env_logger::{Builder, Env};
use log::Record;
use std::io::{self, Write};

/// How a log is written down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// A line of text for each event.
    #[default]
    Text,
    /// A JSON object on a line for each event: `time`, `level`, `target`, `message`.
    Json,
}

/// Logs to standard error from now on: what `RUST_LOG` says, or `info`.
pub fn start_logging(format: LogFormat) {
    let mut builder = Builder::from_env(Env::default().default_filter_or("info"));
    if format == LogFormat::Json {
        builder.format(|out, record| {
            let time = out.timestamp_millis().to_string();
            write_json(out, &time, record)
        });
    }
    builder.init();
}

fn write_json(out: &mut impl Write, time: &str, record: &Record<'_>) -> io::Result<()> {
    let event = serde_json::json!({
        "time": time,
        "level": record.level().as_str(),
        "target": record.target(),
        "message": record.args().to_string(),
    });
    writeln!(out, "{event}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_whatever_it_says() {
        let mut out = Vec::new();
        let record = Record::builder()
            .level(log::Level::Warn)
            .target("x")
            .args(format_args!("two\nlines \"quoted\""))
            .build();
        write_json(&mut out, "now", &record).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert_eq!(text.lines().count(), 1);
        let event: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(event["message"], "two\nlines \"quoted\"");
        assert_eq!(
            (event["level"].as_str(), event["time"].as_str()),
            (Some("WARN"), Some("now"))
        );
    }
}
