//! `starling keys`

use std::{fs::File, path::Path};

use http::Method;
use starling_edge::KeyFile;
use starling_node::{Admin, AuthorityError, StateDir};
use starling_protocol::{
    DocumentEdition,
    admin::{Document, Key, NewKey},
};

use crate::{
    Failure, admin,
    args::{ClientArgs, EditionArgs, KeysCommand, KeysTarget, Output},
    commands::{documents, edge::publication},
    output,
};

pub(crate) async fn run(command: &KeysCommand) -> Result<(), Failure> {
    match command {
        KeysCommand::Create { consumer, plan, target } => {
            let new = NewKey { consumer: consumer.clone(), plan: plan.clone() };
            // Waited for only when the key was shown: it cannot be had again.
            let mut edition = None;
            let key: Key = match place(target)? {
                Place::Edge(file) => file.create(new)?,
                Place::Mesh(file, state, _lock) => {
                    let key = file.create(new)?;
                    // What nobody was told must not be there for the next one to publish.
                    match publish(&file, state, &target.client).await {
                        Ok(published) => edition = Some(published),
                        Err(failure) => {
                            file.revoke(&key.id)?;
                            return Err(failure);
                        }
                    }
                    Key { published: true, ..key }
                }
                Place::Running => {
                    let body = serde_json::to_value(&new)?;
                    admin::ask(&target.client.admin, Method::POST, "/v1/keys", Some(body)).await?
                }
            };
            match target.client.output {
                Output::Json => output::json(&key, false)?,
                _ => println!("{}", key.key.as_deref().unwrap_or_default()),
            }
            let of = target.state.as_ref().filter(|_| key.published);
            let state = of.map_or(String::new(), |state| format!(" --state {}", state.display()));
            let id = key.id;
            eprintln!(
                "the key is shown this once; only its hash is stored. Revoke it with: starling keys revoke {id}{state}"
            );
            match edition {
                Some(edition) => publication::follow(&edition, &target.client).await,
                None => Ok(()),
            }
        }
        KeysCommand::List { target } => {
            let keys: Vec<Key> = match place(target)? {
                Place::Edge(file) => file.list(),
                Place::Mesh(file, ..) => file.list().into_iter().map(|key| Key { published: true, ..key }).collect(),
                Place::Running => admin::ask(&target.client.admin, Method::GET, "/v1/keys", None).await?,
            };
            if target.client.output == Output::Json {
                return output::json(&keys, false);
            }
            let holds = |key: &Key| if key.published { "on all edges" } else { "here" };
            let row = |key: Key| {
                vec![
                    key.id.clone(),
                    key.consumer.clone(),
                    key.plan.clone().unwrap_or_default(),
                    key.created.clone(),
                    holds(&key).into(),
                ]
            };
            output::table(&["ID", "CONSUMER", "PLAN", "CREATED", "HOLDS"], keys.into_iter().map(row).collect());
            Ok(())
        }
        KeysCommand::Revoke { id, target } => {
            let unknown = || Failure::failed(format!("no key has the id {id}; see `starling keys list`"));
            match place(target)? {
                Place::Edge(file) if file.revoke(id)? => {}
                Place::Mesh(file, state, _lock) if file.list().iter().any(|key| key.id == *id) => {
                    file.revoke(id)?;
                    let edition = publish(&file, state, &target.client).await.inspect_err(|_| {
                        eprintln!("the key is revoked here, and that is not published: run the command again");
                    })?;
                    publication::follow(&edition, &target.client).await?;
                }
                Place::Mesh(file, state, _lock) => {
                    // It may have been revoked when that could not be published.
                    publish(&file, state, &target.client).await?;
                    let what = "the keys that are here are published again";
                    return Err(Failure::failed(format!("no key has the id {id}; {what}")));
                }
                Place::Edge(_) => return Err(unknown()),
                Place::Running => {
                    let path = format!("/v1/keys/{id}");
                    let _: serde_json::Value = admin::ask(&target.client.admin, Method::DELETE, &path, None).await?;
                }
            }
            println!("revoked {id}");
            Ok(())
        }
    }
}

/// Where keys are kept that a command is about.
enum Place<'a> {
    /// A running edge, which is asked.
    Running,
    /// The state directory of an edge.
    Edge(KeyFile),
    /// The directory of the mesh's admin key: they hold on all edges.
    Mesh(KeyFile, &'a Path, File),
}

fn place(target: &KeysTarget) -> Result<Place<'_>, Failure> {
    let Some(state) = &target.state else { return Ok(Place::Running) };
    if !state.is_dir() {
        let state = state.display();
        return Err(Failure::failed(format!("{state} is not a directory; give the edge's, or that of the admin key")));
    }
    let dir = StateDir::open(state)?;
    Ok(match Admin::require(&dir) {
        Ok(_) => {
            // One command at a time: each reads, changes and publishes them.
            let lock = File::create(state.join("published-keys.lock")).and_then(|file| file.lock().map(|()| file));
            let lock = lock.map_err(|e| Failure::failed(format!("{}: {e}", state.display())))?;
            Place::Mesh(KeyFile::open_published(dir)?, state, lock)
        }
        Err(AuthorityError::NoAdmin { .. }) => Place::Edge(KeyFile::open(dir)?),
        Err(error) => return Err(error.into()),
    })
}

/// Signs the keys for all edges, and gives them to a node.
async fn publish(file: &KeyFile, state: &Path, client: &ClientArgs) -> Result<DocumentEdition, Failure> {
    let kind = KeyFile::DOCUMENT.parse().map_err(|e: starling_protocol::InvalidName| Failure::failed(e.to_string()))?;
    let args = EditionArgs { kind, state: state.to_owned(), edition: None, client: client.clone() };
    check_base(state, client).await?;
    let edition = documents::issue(&args, file.document()?, None, false).await?;
    eprintln!("{} version {} {}", edition.kind, edition.version, edition.hash);
    std::fs::write(state.join(BASE), edition.hash.to_string())
        .map_err(|e| Failure::failed(format!("{}: {e}", state.join(BASE).display())))?;
    Ok(edition)
}

/// The hash of what was published from here last.
const BASE: &str = "published-keys.hash";

/// Whether the mesh has the keys that were published from here last: what is here may be older than what was published elsewhere.
async fn check_base(state: &Path, client: &ClientArgs) -> Result<(), Failure> {
    let known: Vec<Document> = admin::ask(&client.admin, Method::GET, "/v1/documents", None).await?;
    let Some(known) = known.iter().find(|document| document.kind.as_str() == KeyFile::DOCUMENT) else { return Ok(()) };
    let base = std::fs::read_to_string(state.join(BASE)).unwrap_or_default();
    match base.trim() == known.hash {
        true => Ok(()),
        false => Err(Failure::failed(format!(
            "the keys of the mesh (version {}) were not published from here, and would be replaced by those in {}. Work where they \
             were published last, or copy published-keys.json and {BASE} from there. To begin anew all the same, write {} into {BASE}",
            known.version,
            state.display(),
            known.hash
        ))),
    }
}
