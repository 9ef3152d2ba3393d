//! Reloads when the content of a file changed that the configuration names, whatever happens around it.
//!
//! Directories are watched, because editors and orchestrators replace files, and links to them; but an event there only says
//! that it is time to look. What a reload names newly is watched from then on, and everything is looked at once a minute,
//! because a directory that was replaced as a whole tells nothing any more.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::Duration,
};

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use crate::config::{Files, Jwks, Source, read_config};

/// Editors and orchestrators write in several steps; files are read once these are over.
const SETTLE: Duration = Duration::from_millis(200);
/// How often files are looked at without a reason.
const LOOK: Duration = Duration::from_secs(60);

/// Watches `config`, what it names, and `keys`, as long as the runtime lives. `reload` says itself in the log how it went.
pub(crate) fn spawn(
    reload: impl Fn() -> Result<(), String> + Send + 'static,
    config: PathBuf,
    keys: PathBuf,
    seen: Seen,
) {
    let (changed, mut changes) = mpsc::channel::<()>(1);
    let mut watched = Watched::new(changed.clone());
    let mut files = named(&config, &keys).unwrap_or_else(|| BTreeSet::from([config.clone(), keys.clone()]));
    watched.follow(&files);
    // Something may have changed since it was read.
    let _ = changed.try_send(());
    let Seen(mut seen) = seen;
    tokio::spawn(async move {
        loop {
            // The channel closes only if nothing can be watched; then there is still the look once a minute.
            match tokio::time::timeout(LOOK, changes.recv()).await {
                Ok(Some(())) => tokio::time::sleep(SETTLE).await,
                Ok(None) => tokio::time::sleep(LOOK).await,
                Err(_) => {}
            }
            while changes.try_recv().is_ok() {}
            // While the file cannot be read, what it named counts on.
            files = named(&config, &keys).unwrap_or(files);
            watched.follow(&files);
            let now = content(&files);
            if now != seen {
                seen = now;
                let _ = reload();
            }
        }
    });
}

/// What the files had in them at a moment.
pub(crate) struct Seen(Vec<Option<[u8; 32]>>);

impl Seen {
    /// What they have in them now: to be taken before they are read.
    pub(crate) fn now(config: &Path, keys: &Path) -> Self {
        let files = named(config, keys).unwrap_or_else(|| BTreeSet::from([config.into(), keys.into()]));
        Self(content(&files))
    }
}

/// Every file whose content counts; `None` if the configuration does not say, because something is wrong with it.
fn named(config: &Path, keys: &Path) -> Option<BTreeSet<PathBuf>> {
    let mut files = BTreeSet::from([config.to_path_buf(), keys.to_path_buf()]);
    let text = std::fs::read_to_string(config).unwrap_or_default();
    let (_, sections) = read_config(&text).0?;
    for certificate in sections.certificate {
        match certificate.source {
            Source::Files(Files { cert, key }) => files.extend([cert, key]),
            Source::Acme(acme) => files.extend(acme.ca.into_iter().chain(acme.eab.map(|eab| eab.key_file))),
        }
    }
    if let Some(store) = sections.quota_store {
        files.extend(store.ca.into_iter().chain(store.password_file));
    }
    if let Some(client) = sections.client_certificate {
        files.extend([client.ca].into_iter().chain(client.crl));
    }
    if let Some(jwt) = sections.jwt {
        files.extend(jwt.ca);
        if let Jwks::File(file) = jwt.jwks {
            files.insert(file);
        }
    }
    Some(files)
}

fn content(files: &BTreeSet<PathBuf>) -> Vec<Option<[u8; 32]>> {
    files.iter().map(|file| std::fs::read(file).ok().map(|bytes| Sha256::digest(bytes).into())).collect()
}

/// The directories that are watched.
struct Watched {
    watcher: Option<RecommendedWatcher>,
    directories: BTreeSet<PathBuf>,
}

impl Watched {
    fn new(changed: mpsc::Sender<()>) -> Self {
        let notice = move |event: notify::Result<notify::Event>| {
            if event.is_ok_and(|event| !matches!(event.kind, notify::EventKind::Access(_))) {
                let _ = changed.try_send(());
            }
        };
        let watcher = notify::recommended_watcher(notice)
            .map_err(|error| tracing::warn!(%error, "files are looked at once a minute only; or reload with SIGHUP"))
            .ok();
        Self { watcher, directories: BTreeSet::new() }
    }

    /// Watches the directories of these files, and no others. One that is watched is watched anew: it may be another one by
    /// the same name.
    fn follow(&mut self, files: &BTreeSet<PathBuf>) {
        let Some(watcher) = &mut self.watcher else { return };
        let parent =
            |file: &PathBuf| file.parent().filter(|p| !p.as_os_str().is_empty()).map_or(".".into(), Path::to_path_buf);
        let wanted: BTreeSet<PathBuf> = files.iter().map(parent).collect();
        for directory in &self.directories {
            let _ = watcher.unwatch(directory);
        }
        for directory in wanted.difference(&self.directories) {
            tracing::debug!(directory = %directory.display(), "watching");
        }
        for directory in &wanted {
            if let Err(error) = watcher.watch(directory, RecursiveMode::NonRecursive)
                && !self.directories.contains(directory)
            {
                tracing::warn!(directory = %directory.display(), %error, "not watched; looked at once a minute");
            }
        }
        self.directories = wanted;
    }
}
