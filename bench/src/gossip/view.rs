//! What one agent says of the others, asked over a connection that is kept.

use std::collections::BTreeMap;
use std::io::{BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::msgpack;
use crate::http;

/// How long connecting, or a pause between two reads, may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// serf's RPC in MessagePack: a header, which names the command, and the command's own part.
const RPC_HANDSHAKE: &[u8] = b"\x82\xa7Command\xa9handshake\xa3Seq\x00\x81\xa7Version\x01";
const RPC_MEMBERS: &[u8] = b"\x82\xa7Command\xa7members\xa3Seq\x01";

/// How an agent is asked for its members.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Protocol {
    /// Starling's admin API.
    Http,
    /// serf's RPC.
    Rpc,
}

/// How an agent sees another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Status {
    /// It answers.
    Alive,
    /// It is dead by the judgement of the mesh.
    Down,
    /// Neither: suspected, or gone by its own word.
    Other,
}

/// The members that an agent knows, by name.
#[derive(Debug, PartialEq)]
pub(crate) struct Members(BTreeMap<String, Status>);

impl Members {
    /// How the member of that name is; `None` if the agent does not know it.
    pub(crate) fn status(&self, name: &str) -> Option<Status> {
        self.0.get(name).copied()
    }

    fn parse(list: &Value, name: &str, status: &str) -> Result<Self> {
        let member = |member: &Value| {
            let (name, status) = (member[name].as_str()?, member[status].as_str()?);
            let status = match status {
                "alive" => Status::Alive,
                "down" | "failed" => Status::Down,
                "suspect" | "leaving" | "left" | "none" => Status::Other,
                _ => return None,
            };
            Some((name.to_owned(), status))
        };
        let list = list.as_array().context("no list of members")?;
        let read = |one: &Value| member(one).with_context(|| format!("a member that could not be read: {one}"));
        Ok(Self(list.iter().map(read).collect::<Result<_>>()?))
    }

    fn from_http(body: &[u8]) -> Result<Self> {
        Self::parse(&serde_json::from_slice(body).context("members in JSON")?, "name", "status")
    }

    fn from_rpc(body: &Value) -> Result<Self> {
        Self::parse(&body["Members"], "Name", "Status")
    }
}

/// A connection to one agent, made when it is first needed and again after each failure.
pub(crate) struct View {
    protocol: Protocol,
    address: SocketAddr,
    connection: Option<Connection>,
}

struct Connection {
    stream: BufReader<TcpStream>,
    /// Whether serf has had its handshake.
    greeted: bool,
}

impl View {
    /// A view that is not connected yet.
    pub(crate) fn new(protocol: Protocol, address: SocketAddr) -> Self {
        Self { protocol, address, connection: None }
    }

    /// Asks the agent for the members it knows.
    pub(crate) fn members(&mut self) -> Result<Members> {
        // Put back only when all went well.
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.connect()?,
        };
        let members = connection.ask(self.protocol, self.address).with_context(|| format!("ask {}", self.address))?;
        self.connection = Some(connection);
        Ok(members)
    }

    fn connect(&self) -> Result<Connection> {
        let stream = TcpStream::connect_timeout(&self.address, PATIENCE)
            .with_context(|| format!("connect to {}", self.address))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Connection { stream: BufReader::new(stream), greeted: false })
    }
}

impl Connection {
    fn ask(&mut self, protocol: Protocol, address: SocketAddr) -> Result<Members> {
        match protocol {
            Protocol::Http => {
                let request = format!("GET /v1/members HTTP/1.1\r\nHost: {address}\r\n\r\n");
                self.stream.get_mut().write_all(request.as_bytes())?;
                Members::from_http(&http::read_kept(&mut self.stream)?)
            }
            Protocol::Rpc => {
                if !self.greeted {
                    self.stream.get_mut().write_all(RPC_HANDSHAKE)?;
                    self.read_rpc_header(0)?;
                    self.greeted = true;
                }
                self.stream.get_mut().write_all(RPC_MEMBERS)?;
                self.read_rpc_header(1)?;
                Members::from_rpc(&msgpack::read(&mut self.stream)?)
            }
        }
    }

    fn read_rpc_header(&mut self, sequence: u64) -> Result<()> {
        let header = msgpack::read(&mut self.stream)?;
        ensure!(header["Seq"] == sequence, "an answer to another question: {header}");
        match header["Error"].as_str() {
            Some("") => Ok(()),
            Some(error) => bail!("serf answered: {error}"),
            None => bail!("not a header of serf's RPC: {header}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::TcpListener;

    fn statuses(members: &Members) -> [Option<Status>; 3] {
        ["a", "b", "c"].map(|name| members.status(name))
    }

    #[test]
    fn members_of_starling() {
        let body = br#"[{"name":"a","status":"alive","self":true},{"name":"b","status":"down"}]"#;
        let members = Members::from_http(body).unwrap();
        assert_eq!(statuses(&members), [Some(Status::Alive), Some(Status::Down), None]);
        for bad in [r#"{"error":"x"}"#, r#"[{"name":"a"}]"#, r#"[{"name":"a","status":"odd"}]"#, "["] {
            assert!(Members::from_http(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    /// A view of one that, on its only connection, answers each of these questions in turn.
    fn rpc(exchange: Vec<(&'static [u8], &'static [u8])>) -> View {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            for (question, answer) in exchange {
                let mut asked = vec![0; question.len()];
                stream.read_exact(&mut asked).unwrap();
                assert_eq!(asked, question);
                stream.write_all(answer).unwrap();
            }
        });
        View::new(Protocol::Rpc, address)
    }

    #[test]
    fn serf_is_greeted_once_and_asked_again() {
        let welcome = b"\x82\xa5Error\xa0\xa3Seq\x00";
        let first = b"\x82\xa5Error\xa0\xa3Seq\x01\
            \x81\xa7Members\x92\x82\xa4Name\xa1a\xa6Status\xa5alive\x82\xa4Name\xa1b\xa6Status\xa7leaving";
        let second = b"\x82\xa5Error\xa0\xa3Seq\x01\x81\xa7Members\x91\x82\xa4Name\xa1b\xa6Status\xa6failed";
        let mut view = rpc(vec![(RPC_HANDSHAKE, welcome), (RPC_MEMBERS, first), (RPC_MEMBERS, second)]);
        assert_eq!(statuses(&view.members().unwrap()), [Some(Status::Alive), Some(Status::Other), None]);
        assert_eq!(statuses(&view.members().unwrap()), [None, Some(Status::Down), None]);
        assert!(view.members().is_err());
    }

    #[test]
    fn a_refusal_of_serf_is_an_error() {
        let error = rpc(vec![(RPC_HANDSHAKE, b"\x82\xa5Error\xa2no\xa3Seq\x00")]).members().unwrap_err();
        assert!(format!("{error:#}").contains("serf answered: no"), "{error:#}");
    }
}
