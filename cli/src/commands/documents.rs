//! `starling documents`

use base64::{Engine, engine::general_purpose::STANDARD};
use http::Method;
use starling_node::{Admin, StateDir, unix_now};
use starling_protocol::{
    DocumentEdition, MAX_DOCUMENT_BYTES, MeshDocument, SignedDocument,
    admin::{Document, NewDocument},
    encode,
};

use crate::{
    Failure, admin,
    args::{ClientArgs, DocumentsArgs, DocumentsCommand, EditionArgs, Output},
    output,
};

pub(crate) async fn run(args: &DocumentsArgs) -> Result<(), Failure> {
    match &args.command {
        None => list(&args.client).await,
        Some(DocumentsCommand::Publish(publish)) => {
            let file = &publish.file;
            let content =
                std::fs::read(file).map_err(|e| Failure::failed(format!("cannot read {}: {e}", file.display())))?;
            let expires = publish.expires_in.map(|time| unix_now() + time.as_secs());
            told(&issue(&publish.edition, content, expires, false).await?)
        }
        Some(DocumentsCommand::Delete(delete)) => told(&issue(&delete.edition, Vec::new(), None, true).await?),
    }
}

fn told(edition: &DocumentEdition) -> Result<(), Failure> {
    println!("{} version {} {}", edition.kind, edition.version, edition.hash);
    eprintln!("see it get round with: starling documents");
    Ok(())
}

async fn list(client: &ClientArgs) -> Result<(), Failure> {
    let documents: Vec<Document> = admin::ask(&client.admin, Method::GET, "/v1/documents", None).await?;
    if client.output == Output::Json {
        return output::json(&documents, false);
    }
    let short = |hash: &str| hash.chars().take(12).collect::<String>();
    let mut rows = Vec::new();
    for document in &documents {
        let same = document.nodes.iter().filter(|n| n.hash.as_ref() == Some(&document.hash)).count();
        let state = format!("{:?}", document.state).to_lowercase();
        let (version, held) = (document.version.to_string(), format!("{same}/{}", document.nodes.len()));
        rows.push(vec![document.kind.to_string(), version, short(&document.hash), state, held]);
        let differs = |hash: &Option<String>| hash.as_ref() != Some(&document.hash);
        let wide = client.output == Output::Wide;
        for node in document.nodes.iter().filter(|n| wide || differs(&n.hash) || n.state != Some(document.state)) {
            rows.push(vec![
                format!("  {}", node.node),
                node.version.map_or_else(|| "-".into(), |v| v.to_string()),
                node.hash.as_deref().map_or_else(|| "-".into(), short),
                match (&node.error, node.state) {
                    (Some(error), _) => error.clone(),
                    (None, Some(state)) => format!("{state:?}").to_lowercase(),
                    (None, None) => "missing".into(),
                },
                String::new(),
            ]);
        }
    }
    output::table(&["DOCUMENT", "VERSION", "HASH", "STATE", "NODES"], rows);
    Ok(())
}

/// Signs the next edition and hands it to a node.
pub(super) async fn issue(
    args: &EditionArgs,
    content: Vec<u8>,
    expires: Option<u64>,
    deleted: bool,
) -> Result<DocumentEdition, Failure> {
    if content.len() > MAX_DOCUMENT_BYTES {
        let (kind, length) = (&args.kind, content.len());
        return Err(Failure::failed(format!("{kind} has {length} bytes; a document has at most {MAX_DOCUMENT_BYTES}")));
    }
    let key = Admin::require(&StateDir::existing(&args.state)?)?;
    let known: Vec<Document> = admin::ask(&args.client.admin, Method::GET, "/v1/documents", None).await?;
    let known = known.iter().find(|document| document.kind == args.kind);
    if known.is_none() && deleted {
        return Err(Failure::failed(format!("there is no document {}; see `starling documents`", args.kind)));
    }
    let document = MeshDocument {
        kind: args.kind.clone(),
        version: args.edition.unwrap_or_else(|| known.map_or(0, |k| k.version).saturating_add(1)),
        previous: known.and_then(|k| k.hash.parse().ok()).unwrap_or_default(),
        // At once, whatever the time is where it is read.
        not_before: 0,
        expires,
        deleted,
        content: content.into(),
        understood: true,
    };
    let signed: SignedDocument = key.sign(&document);
    let body = serde_json::to_value(NewDocument { signed: STANDARD.encode(encode(&signed)) })?;
    admin::ask(&args.client.admin, Method::POST, "/v1/documents", Some(body)).await
}
