//! `starling edge publish` and `starling edge rollback`

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use http::Method;
use starling_edge::DOCUMENT;
use starling_protocol::{
    DocumentEdition, DocumentState, NodeKind,
    admin::{Document, Member, MemberStatus},
};

use crate::{
    Failure, admin,
    args::{ClientArgs, EditionArgs, PublishEdgeArgs, RollbackEdgeArgs},
    commands::{check, documents, node},
};

/// Where editions stay that were published from here, below the directory of the admin key, and how many.
const EDITIONS: &str = "published-edge";
const MAX_EDITIONS: usize = 50;
/// How long all edges may take.
const ROLL_OUT: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(100);

pub(super) async fn publish(args: &PublishEdgeArgs) -> Result<(), Failure> {
    let text = node::read_file(&args.file)?;
    let content =
        starling_edge::published(&text).map_err(|problems| Failure::failed(check::render(&args.file, &problems)))?;
    issue(content, &args.state, &args.client).await
}

/// Publishes the edition before the last one again, as far as they were published from here; the last one is put aside, so that it is not
/// come back to.
pub(super) async fn roll_back(args: &RollbackEdgeArgs) -> Result<(), Failure> {
    let editions = editions(&args.state);
    let (last, before) = (editions.last().copied(), editions.iter().nth_back(1).copied());
    let Some(edition) = args.to.or(before) else {
        return Err(Failure::failed(format!(
            "{}: no edition before the last one is here; publish the file that you want",
            args.state.join(EDITIONS).display()
        )));
    };
    let content = node::read_file(&file(&args.state, edition))?;
    eprintln!("publishing edition {edition} again");
    let published = sign(&content, &args.state, &args.client).await?;
    if let Some(last) = last.filter(|last| *last != edition && args.to.is_none()) {
        let file = file(&args.state, last);
        let _ = std::fs::rename(&file, file.with_extension("undone"));
    }
    follow(&published, &args.client).await
}

async fn issue(content: String, state: &Path, client: &ClientArgs) -> Result<(), Failure> {
    let edition = sign(&content, state, client).await?;
    if let Err(error) = keep(state, edition.version, &content) {
        eprintln!("the edition is not kept here, so that `starling edge rollback` will not find it: {error}");
    }
    follow(&edition, client).await
}

async fn sign(content: &str, state: &Path, client: &ClientArgs) -> Result<DocumentEdition, Failure> {
    let kind = DOCUMENT.parse().map_err(|e: starling_protocol::InvalidName| Failure::failed(e.to_string()))?;
    let args = EditionArgs { kind, state: state.to_owned(), edition: None, client: client.clone() };
    let edition = documents::issue(&args, content.as_bytes().to_vec(), None, false).await?;
    println!("{} version {} {}", edition.kind, edition.version, edition.hash);
    Ok(edition)
}

/// Waits until all edges go by an edition, and says which do not.
pub(in crate::commands) async fn follow(edition: &DocumentEdition, client: &ClientArgs) -> Result<(), Failure> {
    let until = Instant::now() + ROLL_OUT;
    let hash = edition.hash.to_string();
    loop {
        let members: Vec<Member> = admin::ask(&client.admin, Method::GET, "/v1/members", None).await?;
        let is_edge = |member: &&Member| member.kind == NodeKind::Edge && member.status == MemberStatus::Alive;
        let edges: BTreeSet<&str> = members.iter().filter(is_edge).map(|member| member.name.as_str()).collect();
        let documents: Vec<Document> = admin::ask(&client.admin, Method::GET, "/v1/documents", None).await?;
        let document = documents.iter().find(|document| document.kind == edition.kind);
        let nodes = document.iter().flat_map(|document| &document.nodes);
        let (mut good, mut refuse) = (BTreeSet::new(), BTreeSet::new());
        for node in nodes.filter(|node| node.hash.as_ref() == Some(&hash) && edges.contains(node.node.as_str())) {
            match node.state {
                Some(DocumentState::Active) => drop(good.insert(node.node.as_str())),
                Some(DocumentState::Pending) | None => {}
                Some(_) => drop(refuse.insert(node.node.as_str())),
            }
        }
        let list = |names: &BTreeSet<&str>| names.iter().copied().collect::<Vec<_>>().join(", ");
        if !refuse.is_empty() {
            return Err(Failure::failed(format!(
                "{} cannot read it and go on by the one before: see their logs; publish another one, or give them what it needs",
                list(&refuse)
            )));
        }
        if good == edges {
            match edges.len() {
                0 => eprintln!("no edge is alive; those that come will get it"),
                count => eprintln!("in force on {count} of {count} edges: {}", list(&edges)),
            }
            return Ok(());
        }
        if Instant::now() > until {
            let late = edges.difference(&good).copied().collect();
            return Err(Failure::failed(format!(
                "not everywhere yet; {} will get it when they are reached: see `starling documents`",
                list(&late)
            )));
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn file(state: &Path, edition: u64) -> PathBuf {
    state.join(EDITIONS).join(format!("{edition}.toml"))
}

/// The editions that are kept, by number.
fn editions(state: &Path) -> BTreeSet<u64> {
    let files = std::fs::read_dir(state.join(EDITIONS)).into_iter().flatten().flatten();
    files.filter_map(|file| file.file_name().to_str()?.strip_suffix(".toml")?.parse().ok()).collect()
}

fn keep(state: &Path, edition: u64, content: &str) -> std::io::Result<()> {
    std::fs::create_dir_all(state.join(EDITIONS))?;
    std::fs::write(file(state, edition), content)?;
    let editions = editions(state);
    let too_many = editions.len().saturating_sub(MAX_EDITIONS);
    editions.into_iter().take(too_many).try_for_each(|old| std::fs::remove_file(file(state, old)))
}
