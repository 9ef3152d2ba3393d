//! A Unix socket between two processes of one node: messages, and descriptors beside them.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{BorrowedFd, OwnedFd},
};

use rustix::{
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
        SendFlags, recvmsg, sendmsg,
    },
    process::Pid,
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::UnixStream,
};

/// Longest message, in bytes.
const MAX_MESSAGE_BYTES: u32 = 1 << 20;
/// Descriptors that go at a time; the kernel takes 253 at most.
const AT_A_TIME: usize = 128;
/// What they go with, because they cannot go alone.
const PLACEHOLDER: u8 = 0;

/// One end of it.
#[derive(Debug)]
pub(super) struct Line(UnixStream);

impl Line {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self(stream)
    }

    /// Sends a message: its length in four bytes, and JSON, so that versions that differ understand each other.
    pub(super) async fn tell(&mut self, message: &impl Serialize) -> io::Result<()> {
        let message = serde_json::to_vec(message)?;
        let length = u32::try_from(message.len()).map_err(io::Error::other)?;
        self.0.write_all(&[&length.to_be_bytes()[..], &message].concat()).await
    }

    /// Receives a message.
    pub(super) async fn hear<T: DeserializeOwned>(&mut self) -> io::Result<T> {
        let length = self.0.read_u32().await?;
        if length > MAX_MESSAGE_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a message that is too long"));
        }
        let mut message = vec![0; length as usize];
        self.0.read_exact(&mut message).await?;
        Ok(serde_json::from_slice(&message)?)
    }

    /// Gives copies of descriptors.
    pub(super) async fn give(&mut self, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        for some in descriptors.chunks(AT_A_TIME) {
            let send = || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(AT_A_TIME))];
                let mut beside = SendAncillaryBuffer::new(&mut space);
                beside.push(SendAncillaryMessage::ScmRights(some));
                Ok(sendmsg(&self.0, &[IoSlice::new(&[PLACEHOLDER])], &mut beside, SendFlags::NOSIGNAL)?)
            };
            self.0.async_io(Interest::WRITABLE, send).await?;
        }
        Ok(())
    }

    /// Takes as many descriptors as are given.
    pub(super) async fn take(&mut self, count: usize) -> io::Result<Vec<OwnedFd>> {
        let mut descriptors = Vec::new();
        while descriptors.len() < count {
            let receive = || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(AT_A_TIME))];
                let mut beside = RecvAncillaryBuffer::new(&mut space);
                let mut byte = [PLACEHOLDER];
                // One byte: what comes behind it has descriptors of its own.
                let received =
                    recvmsg(&self.0, &mut [IoSliceMut::new(&mut byte)], &mut beside, RecvFlags::CMSG_CLOEXEC)?;
                let taken: Vec<OwnedFd> = beside
                    .drain()
                    .filter_map(|message| match message {
                        RecvAncillaryMessage::ScmRights(some) => Some(some),
                        _ => None,
                    })
                    .flatten()
                    .collect();
                Ok((received.bytes, received.flags.contains(ReturnFlags::CTRUNC), taken))
            };
            match self.0.async_io(Interest::READABLE, receive).await? {
                (0, ..) => return Err(io::ErrorKind::UnexpectedEof.into()),
                (_, is_cut, taken) if is_cut || taken.is_empty() => {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "descriptors did not come through; is the limit of open files too low?",
                    ));
                }
                (_, _, taken) => descriptors.extend(taken),
            }
        }
        Ok(descriptors)
    }

    /// Resolves when the other process is gone. Cancel safe.
    pub(super) async fn gone(&mut self) {
        // Nothing more is said.
        while matches!(self.0.read(&mut [0; 64]).await, Ok(read) if read > 0) {}
    }

    /// The process at the other end, as the kernel knows it.
    pub(super) fn pid(&self) -> Option<Pid> {
        self.0.peer_cred().ok().and_then(|peer| Pid::from_raw(peer.pid()?))
    }

    /// The user whose process is at the other end.
    pub(super) fn user(&self) -> Option<u32> {
        self.0.peer_cred().ok().map(|peer| peer.uid())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, Seek, Write},
        os::fd::AsFd,
    };

    use super::*;

    #[tokio::test]
    async fn messages_and_descriptors_arrive_in_order() {
        let (here, there) = UnixStream::pair().unwrap();
        let (mut here, mut there) = (Line::new(here), Line::new(there));
        let files: Vec<File> = (0..AT_A_TIME + 3)
            .map(|nth| {
                let mut file = tempfile::tempfile().unwrap();
                write!(file, "{nth}").unwrap();
                file
            })
            .collect();
        let giving = async {
            here.tell(&"before").await.unwrap();
            here.give(&files.iter().map(AsFd::as_fd).collect::<Vec<_>>()).await.unwrap();
            here.tell(&"behind").await.unwrap();
        };
        let taking = async {
            assert_eq!(there.hear::<String>().await.unwrap(), "before");
            let taken = there.take(files.len()).await.unwrap();
            assert_eq!(there.hear::<String>().await.unwrap(), "behind");
            taken
        };
        let ((), taken) = tokio::join!(giving, taking);
        assert_eq!(taken.len(), files.len());
        for (nth, file) in taken.into_iter().enumerate() {
            let (mut file, mut text) = (File::from(file), String::new());
            file.rewind().unwrap();
            file.read_to_string(&mut text).unwrap();
            assert_eq!(text, nth.to_string());
        }
        drop(here);
        there.gone().await;
    }
}
