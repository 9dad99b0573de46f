// SPDX-License-Identifier: Apache-2.0 OR MIT

//! As much of HTTP as it takes to be asked for metrics.

use super::metrics;
use super::registry::Registry;
use super::status;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Longest time for a question, and for its answer to be taken.
const LIMIT: Duration = Duration::from_secs(5);
/// Longest question, bytes.
const MOST: usize = 8192;

/// A connection on which metrics are asked for.
pub(super) trait Client: Read + Write + Send + 'static {
    /// Longest wait of one read or write.
    fn set_limit(&self, limit: Duration) -> io::Result<()>;
}

impl Client for UnixStream {
    fn set_limit(&self, limit: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(limit))?;
        self.set_write_timeout(Some(limit))
    }
}

impl Client for TcpStream {
    fn set_limit(&self, limit: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(limit))?;
        self.set_write_timeout(Some(limit))
    }
}

/// Answers one question and closes.
pub(super) fn serve(registry: &Registry, client: &mut impl Client) {
    if let Err(error) = client.set_limit(LIMIT).and_then(|()| {
        answer(client, || {
            metrics::text(&status::collect(registry)).map_err(io::Error::other)
        })
    }) {
        log::debug!("metrics: {error}");
    }
}

fn answer(
    client: &mut (impl Read + Write),
    page: impl FnOnce() -> io::Result<String>,
) -> io::Result<()> {
    let (status, body) = match read_path(client)? {
        Ok(path) if path == "/metrics" => ("200 OK", page()?),
        Ok(_) => ("404 Not Found", "there is /metrics\n".into()),
        Err(status) => (status, String::new()),
    };
    let kind = if status.starts_with("200") {
        metrics::CONTENT_TYPE
    } else {
        "text/plain"
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    client.write_all(head.as_bytes())?;
    client.write_all(body.as_bytes())
}

/// What is asked for, or the status that refuses it.
fn read_path(client: &mut impl Read) -> io::Result<Result<String, &'static str>> {
    let deadline = Instant::now() + LIMIT;
    let mut received = Vec::new();
    let mut buffer = [0; 1024];
    loop {
        let count = client.read(&mut buffer)?;
        received.extend_from_slice(&buffer[..count]);
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut request = httparse::Request::new(&mut headers);
        match request.parse(&received) {
            Ok(httparse::Status::Complete(_)) => {
                return Ok(match (request.method, request.path) {
                    (Some("GET"), Some(path)) => Ok(path.to_owned()),
                    _ => Err("405 Method Not Allowed"),
                });
            }
            Ok(httparse::Status::Partial) if received.len() > MOST => {
                return Ok(Err("431 Request Header Fields Too Large"));
            }
            Ok(httparse::Status::Partial) => {}
            Err(_) => return Ok(Err("400 Bad Request")),
        }
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if Instant::now() > deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(question: &str) -> String {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        ours.write_all(question.as_bytes()).unwrap();
        answer(&mut theirs, || Ok("all the figures\n".into())).unwrap();
        drop(theirs);
        let mut text = String::new();
        ours.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn metrics_are_given_and_nothing_else() {
        let good = answered("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(good.starts_with("HTTP/1.1 200 OK\r\n"), "{good}");
        assert!(good.contains("openmetrics") && good.ends_with("\r\n\r\nall the figures\n"));
        let cases = [
            ("GET /etc/passwd HTTP/1.1\r\n\r\n", "404"),
            ("POST /metrics HTTP/1.1\r\n\r\n", "405"),
            ("rubbish\0\r\n\r\n", "400"),
        ];
        for (question, status) in cases {
            let text = answered(question);
            assert!(text.starts_with(&format!("HTTP/1.1 {status}")), "{text}");
            assert!(!text.contains("figures"), "{text}");
        }
        let long = format!("GET /metrics HTTP/1.1\r\nX: {}", "x".repeat(9_000));
        assert!(answered(&long).starts_with("HTTP/1.1 431"));
    }

    #[test]
    fn a_question_that_ends_early_is_not_answered() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        ours.write_all(b"GET /metr").unwrap();
        ours.shutdown(std::net::Shutdown::Write).unwrap();
        let result = answer(&mut theirs, || Ok(String::new()));
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
