//! What load is sent to.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::backend::BODY;
use crate::http;
use crate::process::{self, Process};
use crate::stream;

/// The service name that every call carries as its Host.
pub(crate) const HOST: &str = "web.mesh.internal";

/// The name that the edges' certificate is for.
pub(crate) const PUBLIC_HOST: &str = "api.bench.test";

/// How long a proxy may take to be ready, and then to answer the first call.
pub(crate) const START_LIMIT: Duration = Duration::from_secs(60);

/// An address that answers with the backend's body, and the proxies on the way.
pub(crate) struct Target {
    /// A word for the table.
    pub(crate) name: &'static str,
    /// What the program says of its version.
    pub(crate) version: String,
    /// Where the load goes.
    pub(crate) entry: SocketAddr,
    /// The ports between the proxies, on each side that has a known one; none without a hop.
    pub(crate) hop: Vec<u16>,
    /// The proxies in the order a call meets them; none for the backend itself.
    pub(crate) proxies: Vec<Process>,
}

impl Target {
    /// Waits until a call is answered with the backend's body.
    pub(crate) fn wait_for_answer(&mut self) -> Result<()> {
        self.wait_for_answer_at(self.entry, HOST)
    }

    /// The same for another address that leads through its proxies, and another service of theirs.
    pub(crate) fn wait_for_answer_at(&mut self, entry: SocketAddr, host: &str) -> Result<()> {
        let what = format!("a call to {host} through {} answered with 200", self.name);
        process::wait_until(&what, START_LIMIT, &mut self.proxies.iter_mut().collect::<Vec<_>>(), || {
            let body = http::get(entry, host, "/")?;
            // Within the rest of the answer, not equal to it: a proxy may answer in chunks.
            let start = &BODY.as_bytes()[..BODY.len().min(body.len()).max(1)];
            let whole = body.windows(start.len()).any(|part| part == start);
            ensure!(whole, "200, but not with the backend's body");
            Ok(())
        })
    }

    /// Waits until the server of [`crate::stream`] is reached.
    pub(crate) fn wait_for_echo(&mut self) -> Result<()> {
        let (what, entry) = (format!("a message through {} come back", self.name), self.entry);
        process::wait_until(&what, START_LIMIT, &mut self.proxies.iter_mut().collect::<Vec<_>>(), || {
            stream::ping(entry)
        })
    }
}
