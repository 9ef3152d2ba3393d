use std::{
    collections::HashSet,
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    sync::{LazyLock, Mutex},
};

static GIVEN: LazyLock<Mutex<HashSet<u16>>> = LazyLock::new(Mutex::default);

/// A loopback address whose port is free for TCP and UDP, by the system's word, and was not given before by this process.
pub fn free_port() -> SocketAddr {
    loop {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback has free ports");
        let addr = listener.local_addr().expect("a bound listener has an address");
        let unused = GIVEN.lock().unwrap_or_else(|e| e.into_inner()).insert(addr.port());
        if unused && UdpSocket::bind(addr).is_ok() {
            return addr;
        }
    }
}
