//! The service behind every proxy: one nginx process that answers from its configuration.

use std::path::Path;

use anyhow::{Context, Result};

use crate::nginx;
use crate::process::Process;
use crate::scratch::{self, loopback};
use crate::target::Target;

/// What every body starts with: 128 bytes, which a short one has alone and a longer one over and over.
pub(crate) const BODY: &str = "\
0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\
0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// Starts nginx on a free port; the target has no proxies, and nginx itself comes with it.
///
/// An answer to `/` has a body of the first of these lengths, one to `/LENGTH` of any other.
pub(crate) fn start(scratch: &Path, lengths: &[usize]) -> Result<(Target, Process)> {
    let files = scratch.join("bodies");
    std::fs::create_dir(&files)?;
    let locations = lengths.iter().enumerate().map(|(index, &length)| {
        let path = if index == 0 { String::new() } else { length.to_string() };
        location(&files, &path, length)
    });
    let locations = locations.collect::<Result<String>>()?;
    let [port] = scratch::free_ports()?;
    let server = format!("    server {{\n        listen 127.0.0.1:{port};\n{locations}    }}");
    let nginx = nginx::start("nginx", port, &server, scratch)?;
    let mut target = Target {
        name: "nginx (no proxy)",
        version: nginx::version()?,
        entry: loopback(port),
        hop: Vec::new(),
        proxies: Vec::new(),
    };
    target.wait_for_answer()?;
    Ok((target, nginx))
}

/// A short body is answered from the configuration, a long one from a file, as nginx would send it.
fn location(files: &Path, path: &str, length: usize) -> Result<String> {
    let body: String = BODY.chars().cycle().take(length).collect();
    let answer = if length <= BODY.len() {
        format!("return 200 \"{body}\";")
    } else {
        std::fs::write(files.join(length.to_string()), &body).context("write a body")?;
        format!("root {}; try_files /{length} =500;", files.display())
    };
    Ok(format!("        location = /{path} {{ default_type text/plain; {answer} }}\n"))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_body_has_128_bytes() {
        assert_eq!(super::BODY.len(), 128);
    }
}
