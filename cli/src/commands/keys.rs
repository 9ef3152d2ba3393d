//! `starling keys`

use http::Method;
use starling_edge::KeyFile;
use starling_node::StateDir;
use starling_protocol::admin::{Key, NewKey};

use crate::{
    Failure, admin,
    args::{KeysCommand, KeysTarget, Output},
    output,
};

pub(crate) async fn run(command: &KeysCommand) -> Result<(), Failure> {
    match command {
        KeysCommand::Create { consumer, plan, target } => {
            let new = NewKey { consumer: consumer.clone(), plan: plan.clone() };
            let key: Key = match key_file(target)? {
                Some(file) => file.create(new)?,
                None => {
                    let body = serde_json::to_value(&new)?;
                    admin::ask(&target.client.admin, Method::POST, "/v1/keys", Some(body)).await?
                }
            };
            match target.client.output {
                Output::Json => output::json(&key, false)?,
                _ => println!("{}", key.key.as_deref().unwrap_or_default()),
            }
            eprintln!(
                "the key is shown this once; only its hash is stored. Revoke it with: starling keys revoke {}",
                key.id
            );
            Ok(())
        }
        KeysCommand::List { target } => {
            let keys: Vec<Key> = match key_file(target)? {
                Some(file) => file.list(),
                None => admin::ask(&target.client.admin, Method::GET, "/v1/keys", None).await?,
            };
            if target.client.output == Output::Json {
                return output::json(&keys, false);
            }
            let rows = keys.into_iter().map(|k| vec![k.id, k.consumer, k.plan.unwrap_or_default(), k.created]);
            output::table(&["ID", "CONSUMER", "PLAN", "CREATED"], rows.collect());
            Ok(())
        }
        KeysCommand::Revoke { id, target } => {
            match key_file(target)? {
                Some(file) if file.revoke(id)? => {}
                Some(_) => return Err(Failure::failed(format!("no key has the id {id}; see `starling keys list`"))),
                None => {
                    let path = format!("/v1/keys/{id}");
                    let _: serde_json::Value = admin::ask(&target.client.admin, Method::DELETE, &path, None).await?;
                }
            }
            println!("revoked {id}");
            Ok(())
        }
    }
}

fn key_file(target: &KeysTarget) -> Result<Option<KeyFile>, Failure> {
    let Some(state) = &target.state else { return Ok(None) };
    if !state.is_dir() {
        return Err(Failure::failed(format!("{} is not a directory; give the edge's --state", state.display())));
    }
    Ok(Some(KeyFile::open(StateDir::open(state)?)?))
}
