//! Where processes run and sockets are made: on the host, or in a network namespace of their own.
//!
//! A namespace belongs to a thread (network_namespaces(7)): whatever that thread makes is inside it, and works from
//! anywhere afterwards. With the thread and its children it goes, so that nothing is left behind.

use std::{
    net::SocketAddr,
    sync::{Arc, mpsc},
};

use anyhow::{Context, Result, anyhow, bail};

type Job = Box<dyn FnOnce() + Send>;

/// Where processes run and sockets are made.
#[derive(Debug, Clone)]
pub(crate) enum Place {
    /// This process's own network.
    Host,
    /// A namespace.
    Namespace(Arc<Namespace>),
}

impl Place {
    /// Does something there. Children and sockets that it makes stay there.
    pub(crate) fn within<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        match self {
            Self::Host => work(),
            Self::Namespace(namespace) => namespace.within(work),
        }
    }

    /// Connects from there.
    pub(crate) async fn connect(&self, to: SocketAddr) -> Result<tokio::net::TcpStream> {
        let socket = self.within(tokio::net::TcpSocket::new_v4)?;
        let stream = socket.connect(to).await?;
        let _ = stream.set_nodelay(true);
        Ok(stream)
    }

    /// A UDP socket there, on a port of the system's choice.
    pub(crate) fn udp(&self) -> Result<std::net::UdpSocket> {
        let any: SocketAddr = match self {
            Self::Host => ([127, 0, 0, 1], 0).into(),
            Self::Namespace(_) => ([0, 0, 0, 0], 0).into(),
        };
        let socket = self.within(move || std::net::UdpSocket::bind(any))?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    }
}

/// A network namespace, and the thread that holds it.
#[derive(Debug)]
pub(crate) struct Namespace {
    jobs: mpsc::Sender<Job>,
}

impl Namespace {
    /// A new one, in which only loopback is up.
    pub(super) fn new(name: &str) -> Result<Self> {
        let (jobs, work) = mpsc::channel::<Job>();
        let (ready, is_ready) = mpsc::channel();
        let runtime = tokio::runtime::Handle::current();
        std::thread::Builder::new().name(name.into()).spawn(move || {
            let _runtime = runtime.enter();
            let made = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
                .context("no new network namespace")
                .and_then(|()| ip(&["link", "set", "lo", "up"]));
            let failed = made.is_err();
            let _ = ready.send(made);
            while let (false, Ok(job)) = (failed, work.recv()) {
                job();
            }
        })?;
        is_ready.recv().context("the namespace's thread has ended")??;
        Ok(Self { jobs })
    }

    fn within<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = mpsc::channel();
        let job = move || {
            let _ = done.send(work());
        };
        let sent = self.jobs.send(Box::new(job)).map_err(|_| anyhow!("the namespace's thread has ended"));
        sent.and_then(|()| Ok(result.recv()?)).expect("the namespace's thread lives as long as the namespace")
    }
}

/// Runs `ip`, in the namespace of the calling thread.
pub(super) fn ip(args: &[&str]) -> Result<()> {
    let output = std::process::Command::new("ip").args(args).output();
    let output = output.context("cannot run `ip`; install iproute2")?;
    if !output.status.success() {
        bail!("ip {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
