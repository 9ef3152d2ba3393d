//! Which socket of a port gets a packet: decided in the kernel, by the first bytes of the packet's connection id.
//!
//! ```text
//! a connection id that is made here:   [index of the socket's thread] [mark of the process, 2] [random, 5]
//! one that a client aims:              [any index]                    [random, 7]
//! ```
#![allow(unsafe_code)] // one setsockopt that no safe wrapper offers

use std::{io, net::UdpSocket, os::fd::AsRawFd, time::Duration};

use quinn::{ConnectionId, ConnectionIdGenerator};
use rand::RngExt;
use serde::{Deserialize, Serialize};

const CONNECTION_ID_BYTES: usize = 8;

/// Tells the connection ids of a process from those of the one before it on the same port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mark(u16);

impl Mark {
    /// One that is not `before`.
    pub(super) fn other_than(before: Option<Self>) -> Self {
        loop {
            let mark = Self(rand::rng().random());
            if Some(mark) != before {
                return mark;
            }
        }
    }
}

/// Makes connection ids whose packets go to the socket of that index, in the process of that mark.
#[derive(Debug, Clone, Copy)]
pub struct OwnedBy {
    pub(super) index: u8,
    pub(super) mark: Mark,
}

impl OwnedBy {
    /// Of the socket.
    pub fn index(self) -> u8 {
        self.index
    }
}

impl ConnectionIdGenerator for OwnedBy {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; CONNECTION_ID_BYTES];
        id[0] = self.index;
        id[1..3].copy_from_slice(&self.mark.0.to_be_bytes());
        rand::rng().fill(&mut id[3..]);
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        CONNECTION_ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// The first connection id of a client that wants the thread of that index, in whichever process has the port.
pub fn aimed_at(index: u8) -> ConnectionId {
    let mut id = [0; CONNECTION_ID_BYTES];
    rand::rng().fill(&mut id[1..]);
    id[0] = index;
    ConnectionId::new(&id)
}

/// How packets are dealt out among the sockets of one process: which socket, counted over all of the port, gets the first byte of
/// a connection id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Deal {
    /// Indices below this have a socket each,
    pub(super) fixed: u32,
    /// from here on.
    pub(super) fixed_at: u32,
    /// All others share so many,
    pub(super) shared: u32,
    /// from here on.
    pub(super) shared_at: u32,
}

impl Deal {
    /// Among sockets that are behind each other, from `first` on.
    pub(super) fn from(first: usize, fixed: usize, shared: usize) -> Self {
        let at = |nth: usize| nth as u32;
        Self { fixed: at(fixed), fixed_at: at(first), shared: at(shared), shared_at: at(first + fixed) }
    }

    /// The sockets that it deals to.
    pub(super) fn range(self) -> std::ops::Range<usize> {
        self.fixed_at as usize..(self.shared_at + self.shared) as usize
    }
}

/// Has the kernel deal the packets of a port's sockets, of which `socket` is one; those with the mark of the process before,
/// by that one's deal.
pub(super) fn steer(socket: &UdpSocket, deal: Deal, before: Option<(Mark, Deal)>) -> io::Result<()> {
    attach(socket, program(deal, before))
}

/// Has the kernel give every packet to the socket that was first on its port.
pub(super) fn all_to_the_first(socket: &UdpSocket) -> io::Result<()> {
    attach(socket, vec![libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: 0 }])
}

fn attach(socket: &UdpSocket, mut program: Vec<libc::sock_filter>) -> io::Result<()> {
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the descriptor is open for the length of the call, and the kernel copies `filter` and the `len` instructions
    // that it points to before the call returns.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_CBPF,
            std::ptr::from_ref(&filter).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Classic BPF. The destination connection id is at offset 1 after a short header and 6 after a long one (RFC 9000 §17); its
/// index goes to X, its mark to M\[0\].
fn program(deal: Deal, before: Option<(Mark, Deal)>) -> Vec<libc::sock_filter> {
    let op = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
    let load = |size: u32, at: u32| op(libc::BPF_LD | size | libc::BPF_ABS, 0, 0, at);
    let jump = |how: u32, k: u32, jt: u8, jf: u8| op(libc::BPF_JMP | how | libc::BPF_K, jt, jf, k);
    let compute = |what: u32, k: u32| op(libc::BPF_ALU | what | libc::BPF_K, 0, 0, k);
    let done = op(libc::BPF_RET | libc::BPF_A, 0, 0, 0);
    let deals = |Deal { fixed, fixed_at, shared, shared_at }: Deal| {
        [
            op(libc::BPF_MISC | libc::BPF_TXA, 0, 0, 0),
            jump(libc::BPF_JGE, fixed, 2, 0),
            compute(libc::BPF_ADD, fixed_at),
            done,
            compute(libc::BPF_SUB, fixed),
            compute(libc::BPF_MOD, shared),
            compute(libc::BPF_ADD, shared_at),
            done,
        ]
    };
    let is_long = 0x80;
    let mut program = vec![
        load(libc::BPF_B, 0),
        jump(libc::BPF_JSET, is_long, 0, 4),
        load(libc::BPF_H, 7),
        op(libc::BPF_ST, 0, 0, 0),
        load(libc::BPF_B, 6),
        jump(libc::BPF_JA, 3, 0, 0),
        load(libc::BPF_H, 2),
        op(libc::BPF_ST, 0, 0, 0),
        load(libc::BPF_B, 1),
        op(libc::BPF_MISC | libc::BPF_TAX, 0, 0, 0),
    ];
    if let Some((Mark(mark), before)) = before {
        let before = deals(before);
        program.push(op(libc::BPF_LD | libc::BPF_MEM, 0, 0, 0));
        program.push(jump(libc::BPF_JEQ, mark.into(), 0, before.len() as u8));
        program.extend(before);
    }
    program.extend(deals(deal));
    program
}
