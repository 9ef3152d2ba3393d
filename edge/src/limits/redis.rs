//! Counts in a Redis or Valkey, which stands in the place of the edge that owns a counter: the same questions, the same leases.
//!
//! Each counter is a hash of the numbers in [`Counts`], which are merged there as edges merge them. So whatever a store has
//! forgotten, or was not there to be told, it learns from the edges.

use std::{collections::BTreeMap, fs, sync::LazyLock};

use redis::{Pipeline, RedisConnectionInfo, Script, aio::MultiplexedConnection};
use starling_node::web::Web;
use starling_protocol::{AskCounts, KnownCount, TakeCount, TakenCount, TellCounts};
use tokio::{sync::Mutex, time::Instant};

use super::{counts::Counts, tally::PATIENCE};
use crate::config::QuotaStore;

/// Where it listens that says nothing else.
const PORT: u16 = 6379;
/// How long a counter is kept that nobody uses: longer than any quota, in seconds.
const KEPT_S: u64 = 70 * 24 * 60 * 60;

/// Learns what the asking edge knows, gives a lease if one is asked for, and tells what is known then.
static SCRIPT: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("redis.lua")));

/// A store, as its file says where.
pub(crate) struct Redis {
    config: QuotaStore,
    web: Web,
    /// One question goes there at a time. Taken out while it is used: what a question has left behind that was given up is not read as an
    /// answer to the next.
    connection: Mutex<Option<MultiplexedConnection>>,
    name: std::sync::Mutex<Called>,
}

impl Redis {
    /// In the place of another one, or of none.
    ///
    /// # Errors
    /// What is wrong with the file of certificates.
    pub(crate) fn new(config: &QuotaStore, in_place_of: Option<&Self>) -> Result<Self, String> {
        let web = match config.url.tls {
            true => Web::trusting(config.ca.as_deref()).map_err(|e| e.to_string())?,
            false => Web::plain(),
        };
        let name = in_place_of.map(|former| match former.config.url == config.url {
            true => lock(&former.name).name.clone().unwrap_or_default(),
            false => String::new(),
        });
        let name = std::sync::Mutex::new(Called { name, another: None });
        Ok(Self { config: config.clone(), web, connection: Mutex::default(), name })
    }

    pub(crate) fn config(&self) -> &QuotaStore {
        &self.config
    }

    /// Puts a question. Cancel safe, but that a lease may have been given whose answer nobody hears.
    pub(super) async fn ask(&self, ask: &AskCounts) -> Result<TellCounts, String> {
        let mut place = self.connection.lock().await;
        let mut connection = match place.take() {
            Some(connection) => connection,
            None => self.connect().await?,
        };
        let questions = questions(ask);
        let mut pipeline = redis::pipe();
        for (key, question) in &questions {
            self.put(&mut pipeline, key, question);
        }
        if questions.is_empty() {
            self.greet(&mut pipeline);
        }
        let answers: Vec<Answer> = pipeline.query_async(&mut connection).await.map_err(|e| e.to_string())?;
        *place = Some(connection);
        let name = answers.first().map(|(_, _, name)| name.clone()).unwrap_or_default();
        if !lock(&self.name).is_still(name) {
            // Whoever was taken for silent is told everything when it is back.
            return Err("it is another one, or has forgotten everything".into());
        }
        let mut heard: BTreeMap<&str, (u64, Counts)> = BTreeMap::new();
        for ((key, _), (taken, fields, _)) in questions.iter().zip(answers) {
            heard.insert(key, (taken, counts_of(&fields)));
        }
        let mut told = TellCounts::default();
        for take in &ask.takes {
            let (taken, counts) = heard.get(take.key.as_str()).ok_or("it left something out")?;
            told.taken.push(TakenCount { taken: *taken, counts: counts.encode().into() });
        }
        for key in &ask.finds {
            let (_, counts) = heard.get(key.as_str()).ok_or("it left something out")?;
            told.found.push(KnownCount { key: key.clone(), counts: counts.encode().into() });
        }
        Ok(told)
    }

    async fn connect(&self) -> Result<MultiplexedConnection, String> {
        let QuotaStore { url, password_file, .. } = &self.config;
        // Read each time, because it may be another one now.
        let password = match password_file {
            Some(file) => {
                let text =
                    fs::read_to_string(file).map_err(|e| format!("{}: it cannot be read ({e})", file.display()))?;
                Some(text.trim_end_matches(['\r', '\n']).to_owned())
            }
            None => url.password.clone(),
        };
        let mut info = RedisConnectionInfo::default().set_db(url.database.into()).set_skip_set_lib_name();
        if let Some(user) = &url.user {
            info = info.set_username(user);
        }
        if let Some(password) = password {
            info = info.set_password(password);
        }
        let stream = self.web.stream(&url.authority, PORT, url.tls).await.map_err(|e| e.to_string())?;
        // Whoever asks says how long an answer may take.
        let config = redis::AsyncConnectionConfig::new().set_response_timeout(None).set_connection_timeout(None);
        let made = MultiplexedConnection::new_with_config(&info, stream, config).await.map_err(|e| e.to_string())?;
        let (mut connection, driver) = made;
        tokio::spawn(driver);
        SCRIPT.prepare_invoke().load_async(&mut connection).await.map_err(|e| e.to_string())?;
        Ok(connection)
    }

    /// Finds out whether it takes what it is told.
    fn greet(&self, pipeline: &mut Pipeline) {
        let mut knows = Counts::default();
        knows.learn(0, 0, starling_node::unix_now(), 0);
        self.put(pipeline, "", &Question { take: None, knows });
    }

    fn put(&self, pipeline: &mut Pipeline, key: &str, question: &Question<'_>) {
        let prefix = &self.config.prefix;
        let none = TakeCount { key: String::new(), part: 0, since: 0, limit: 0, least: 0, most: 0 };
        let TakeCount { part, since, limit, least, most, .. } = question.take.unwrap_or(&none);
        let call = pipeline.cmd("EVALSHA").arg(SCRIPT.get_hash()).arg(2);
        call.arg(format!("{prefix}:quota:{key}")).arg(format!("{prefix}:life"));
        call.arg(rand::random_range(1..1u64 << 53)).arg(part).arg(since).arg(limit).arg(least).arg(most).arg(KEPT_S);
        for (part, life, taken, returned) in question.knows.numbers() {
            for (kind, number) in [('t', taken), ('r', returned)].into_iter().filter(|(_, number)| *number > 0) {
                call.arg(format!("{part}:{life}:{kind}")).arg(number);
            }
        }
    }
}

/// What a store calls itself.
#[derive(Default)]
struct Called {
    /// The last one; empty if whoever is there is to be told everything.
    name: Option<String>,
    /// Since when it is another one.
    another: Option<Instant>,
}

impl Called {
    /// Whether it is the one that it was. Another one is refused for a moment, so that it is taken for silent.
    fn is_still(&mut self, name: String) -> bool {
        let is_other = self.name.as_ref().is_some_and(|known| *known != name);
        if is_other && self.another.get_or_insert_with(Instant::now).elapsed() < PATIENCE {
            return false;
        }
        *self = Self { name: Some(name), another: None };
        true
    }
}

/// What is taken, the counter as it is then, and what the store calls itself.
type Answer = (u64, Vec<String>, String);

fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// What is to be done with a counter.
#[derive(Default)]
struct Question<'a> {
    take: Option<&'a TakeCount>,
    knows: Counts,
}

/// One for each counter.
fn questions(ask: &AskCounts) -> BTreeMap<&str, Question<'_>> {
    let mut questions: BTreeMap<&str, Question<'_>> = BTreeMap::new();
    for KnownCount { key, counts } in &ask.knows {
        questions.entry(key).or_default().knows.merge(&Counts::decode(counts).unwrap_or_default());
    }
    for take in &ask.takes {
        questions.entry(&take.key).or_default().take = Some(take);
    }
    for key in &ask.finds {
        questions.entry(key).or_default();
    }
    questions
}

/// What a hash says; what nobody of us has written is not heard.
fn counts_of(fields: &[String]) -> Counts {
    let parsed = |[field, number]: &[String; 2]| {
        let mut names = field.split(':');
        let mut next = || names.next()?.parse::<u64>().ok();
        let (part, life, number) = (next()?, next()?, number.parse::<u64>().ok()?);
        match names.next() {
            Some("t") => Some((part, life, number, 0)),
            Some("r") => Some((part, life, 0, number)),
            _ => None,
        }
    };
    let mut numbers: Vec<_> = fields.as_chunks::<2>().0.iter().filter_map(parsed).collect();
    // A hash has no order, and of more parts than are remembered the last ones are to stay.
    numbers.sort_unstable();
    let mut counts = Counts::default();
    numbers.into_iter().for_each(|(part, life, taken, returned)| counts.learn(part, life, taken, returned));
    counts
}

#[cfg(test)]
mod tests {
    use super::{super::counts::Life, *};

    #[test]
    fn what_is_written_is_read() {
        let mut counts = Counts::default();
        counts.add(100, Life(7), 5);
        counts.give_back(100, Life(8), 2);
        let fields =
            ["100:7:t", "5", "100:8:r", "2", "nonsense", "1", "100:7:x", "9", "100:9:t", "-1"].map(String::from);
        assert_eq!(counts_of(&fields), counts);
    }

    #[test]
    fn of_many_parts_the_last_ones_stay_in_whatever_order_they_come() {
        let fields: Vec<String> =
            (0..100).map(|nth| nth * 37 % 100).flat_map(|part| [format!("{part}:7:t"), "1".into()]).collect();
        let read = counts_of(&fields);
        let mut known = Counts::default();
        known.add(99, Life(8), 5);
        known.merge(&read);
        for counts in [&read, &known] {
            assert_eq!(counts.numbers().last().map(|(part, ..)| part), Some(99));
        }
        assert!(known.has(Life(8)));
    }
}
