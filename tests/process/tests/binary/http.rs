//! The control API without the command line, for what the command line would never say.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use cofferdam_process_tests::nbd::connect;
use serde_json::Value;

/// One call: the status and the document.
#[track_caller]
pub(crate) fn call(socket: &Path, method: &str, path: &str, body: &str) -> (u16, Value) {
    let mut stream = begin(socket, method, path, body);
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no end of the head in {answer:?}"));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    let document = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {body}"));
    (status.unwrap_or_else(|| panic!("no status in {head}")), document)
}

/// A call whose answer nobody has read yet.
#[track_caller]
pub(crate) fn begin(socket: &Path, method: &str, path: &str, body: &str) -> UnixStream {
    let mut stream = connect(socket);
    let length = body.len();
    let words = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    );
    stream.write_all(words.as_bytes()).expect("sent");
    stream
}

/// A stream of events: its head has come, of the rest nothing was read beyond a little.
#[track_caller]
pub(crate) fn follow(socket: &Path) -> BufReader<UnixStream> {
    let mut stream = BufReader::with_capacity(512, begin(socket, "GET", "/v1/events?follow=true", ""));
    let mut line = String::new();
    stream.read_line(&mut line).expect("a status");
    assert!(line.starts_with("HTTP/1.1 200"), "{line}");
    while !line.trim_end().is_empty() {
        line.clear();
        stream.read_line(&mut line).expect("a line of the head");
    }
    stream
}
