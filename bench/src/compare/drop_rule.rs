//! Packets lost on purpose, on the ports of a hop only.

use std::process::Command;

use anyhow::Result;

use crate::process;

/// A rule of nftables in the bench's own namespace; gone when it is dropped.
pub(super) struct DropRule(());

impl DropRule {
    /// Drops so many of a hundred packets, at random, that are to or from these ports on loopback.
    pub(super) fn new(percent: u32, ports: &[u16]) -> Result<Self> {
        nft(&script(percent, ports))?;
        Ok(Self(()))
    }
}

impl Drop for DropRule {
    fn drop(&mut self) {
        let _ = nft("delete table inet bench");
    }
}

/// Where packets arrive, not where they are sent: there a dropped packet would be an error that its sender sees. One
/// packet is judged once, also when both its ports are of the hop.
fn script(percent: u32, ports: &[u16]) -> String {
    let ports = ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
    let judge = |side: &str| {
        format!("meta l4proto {{ tcp, udp }} th {side} {{ {ports} }} numgen random mod 100 < {percent} drop")
    };
    format!(
        "table inet bench {{
  chain hop {{
    type filter hook input priority 0; policy accept;
    {}
    meta l4proto {{ tcp, udp }} th dport {{ {ports} }} accept
    {}
  }}
}}
",
        judge("dport"),
        judge("sport")
    )
}

fn nft(script: &str) -> Result<()> {
    let nft = process::require("nft", "apt-get install -y nftables")?;
    process::run("nft", Command::new(nft).arg(script)).map(drop)
}
