//! Downloads from the hub that survive anything: what arrived is kept under `.download/` and goes on from its length, a
//! file gets its name only when size and hash are those that the hub announces.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use fs4::fs_std::FileExt;
use futures::StreamExt;
use hf_hub::{HFClient, HFClientBuilder, HFError};
use reqwest::header::{HeaderMap, AUTHORIZATION, CONTENT_LENGTH, ETAG, LOCATION};
use reqwest::StatusCode;
use sha2::{Digest, Sha256};
use wan_models::arch::ModelFile;

use super::page;
use crate::cache::fingerprint::hex;
use crate::error::UserError;
use crate::fsio;

/// The folder in which unfinished downloads wait, inside the directory that they are for.
const STAGING: &str = ".download";
/// A connection that says nothing for so long is given up.
const SILENCE: Duration = Duration::from_secs(60);
/// Tries in a row that bring nothing, before a download is given up.
const TRIES: u32 = 5;
const BUFFER: usize = 1 << 20;

/// Access to the hub.
#[derive(Debug, Clone)]
pub struct Hub {
    endpoint: String,
    token: Option<String>,
    /// No network (`HF_HUB_OFFLINE`).
    offline: bool,
    /// The wait before the second try; it doubles with each further one.
    patience: Duration,
    /// The last answer waited for did not come, for all tries. Clones share it.
    silent: Arc<AtomicBool>,
}

/// What the hub says of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remote {
    pub size: u64,
    /// Of the content, in hexadecimal; small files that are not in the large-file store have none.
    pub sha256: Option<String>,
}

/// Whoever watches a download.
pub struct Transfer<'a> {
    /// Gets the bytes that are there and the size, as they arrive.
    pub progress: &'a mut dyn FnMut(u64, u64),
    /// Raised to end it; what arrived stays.
    pub stop: &'a AtomicBool,
}

/// Why a try failed.
enum Failure {
    /// Trying again cannot help.
    Final(String),
    /// It may pass; after this time if the server says so.
    Passing(String, Option<Duration>),
    /// The disk's fault, not the network's.
    Disk(anyhow::Error),
    Stopped,
}

impl Hub {
    /// As the environment says: `HF_ENDPOINT`, `HF_TOKEN` (or the token that a login has left under `HF_HOME`),
    /// `HF_HUB_OFFLINE`.
    pub fn from_env() -> Self {
        let set = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let offline = set("HF_HUB_OFFLINE").is_some_and(|v| !matches!(v.to_lowercase().as_str(), "0" | "false" | "no"));
        let of_file = |path: PathBuf| std::fs::read_to_string(path).ok().map(|t| t.trim().to_owned());
        let token = set("HF_TOKEN")
            .or_else(|| of_file(set("HF_TOKEN_PATH")?.into()))
            .or_else(|| of_file(hf_hub::hf_home().join("token")))
            .filter(|t| !t.is_empty());
        Self { token, offline, ..Self::at(endpoint) }
    }

    /// A server of one's own; for tests and mirrors.
    pub fn at(endpoint: impl Into<String>) -> Self {
        let endpoint = endpoint.into().trim_end_matches('/').to_owned();
        Self { endpoint, token: None, offline: false, patience: Duration::from_secs(1), silent: Arc::default() }
    }

    pub fn with_token(self, token: Option<String>) -> Self {
        Self { token: token.or(self.token), ..self }
    }

    /// How long to wait before the second try; the wait doubles with each further one.
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// Size and hash of a file, from the hub. Once a hub has not answered in all tries, further files ask it a single time.
    /// Errors name the file, its page, and the way by hand.
    pub fn describe(&self, file: &ModelFile, dir: &Path) -> Result<Remote> {
        if self.offline {
            return Err(self.failed(file, dir, "HF_HUB_OFFLINE is set"));
        }
        let runtime = runtime()?;
        let tries = if self.silent.load(Ordering::Relaxed) { 1 } else { TRIES };
        self.patiently(tries, &AtomicBool::new(false), |_| runtime.block_on(self.head(file)))
            .map_err(|failure| self.explain(file, dir, failure))
    }

    /// Downloads a file into `dir` under its local name. Goes on from what an earlier try left behind, tries again
    /// where a fault may pass, and checks size and hash before the file gets its name.
    ///
    /// Errors: unreachable, refused (a token is needed), absent, damaged, disk full, stopped; each names the file, its
    /// page, and where to put it by hand.
    #[tracing::instrument(level = "debug", skip_all, name = "download", fields(file = %file.name))]
    pub fn fetch(&self, file: &ModelFile, remote: &Remote, dir: &Path, mut transfer: Transfer<'_>) -> Result<PathBuf> {
        let target = dir.join(&file.name);
        let path = part(file, remote, dir);
        fsio::create_dir(path.parent().unwrap_or(dir))?;
        let failed = |failure| self.explain(file, dir, failure);
        let mut part = Part::open(&path, transfer.stop).map_err(failed)?;
        let mut fresh = part.have == 0;
        loop {
            let runtime = runtime()?;
            self.patiently(TRIES, transfer.stop, |progressed| {
                let before = part.have;
                let got = runtime.block_on(self.rest(file, remote, &mut part, &mut transfer));
                *progressed = part.have > before;
                got
            })
            .map_err(failed)?;
            let wrong = match &remote.sha256 {
                Some(want) => (part.hash() != *want).then(|| "its hash is not the announced one".to_owned()),
                None => None,
            };
            match wrong {
                None => break,
                // What an earlier run left behind may have been torn by a power cut: once more, from the start.
                Some(_) if !fresh => part.restart().map_err(|e| failed(Failure::Disk(fsio::explain(e, &path))))?,
                Some(why) => {
                    let _ = std::fs::remove_file(&path);
                    return Err(failed(Failure::Final(format!("what arrived is damaged: {why}"))));
                }
            }
            fresh = true;
        }
        part.file.sync_all().map_err(|e| fsio::explain(e, &path))?;
        if let Some(parent) = target.parent() {
            fsio::create_dir(parent)?;
        }
        std::fs::rename(&path, &target).map_err(|e| fsio::explain(e, &target))?;
        // Only an empty one goes.
        let _ = std::fs::remove_dir(dir.join(STAGING));
        Ok(target)
    }

    /// Tries until it works, until a fault that will not pass, or until nothing came for `most` times in a row. A
    /// try that fails after bringing something (it sets its flag) does not count.
    fn patiently<T>(
        &self,
        most: u32,
        stop: &AtomicBool,
        mut attempt: impl FnMut(&mut bool) -> std::result::Result<T, Failure>,
    ) -> std::result::Result<T, Failure> {
        let mut tries = 0;
        loop {
            let mut progressed = false;
            let (why, after) = match attempt(&mut progressed) {
                Err(Failure::Passing(why, after)) => (why, after),
                done => {
                    self.silent.store(false, Ordering::Relaxed);
                    return done;
                }
            };
            tries = if progressed { 1 } else { tries + 1 };
            if tries >= most {
                self.silent.store(true, Ordering::Relaxed);
                return Err(Failure::Final(why));
            }
            let longest = Duration::from_secs(120);
            let mut left = after.unwrap_or(self.patience * 2u32.pow(tries - 1)).min(longest);
            match left < Duration::from_secs(1) {
                true => tracing::debug!(%why, wait = ?left, "the hub is tried again"),
                false => tracing::warn!("{why}; the next try is in {} s", left.as_secs()),
            }
            while !left.is_zero() {
                if stop.load(Ordering::Relaxed) {
                    return Err(Failure::Stopped);
                }
                let nap = left.min(Duration::from_millis(200));
                std::thread::sleep(nap);
                left -= nap;
            }
        }
    }

    /// The headers of a file. Large files answer with a redirect to their store, and the hub's own headers on that very
    /// answer say size and hash; only a redirect within the hub (a renamed repository) is followed.
    async fn head(&self, file: &ModelFile) -> std::result::Result<Remote, Failure> {
        let client = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(SILENCE)
            .user_agent(concat!("wan-train/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|e| Failure::Final(unreachable_because(&e)))?;
        let mut url = format!("{}/{}/resolve/main/{}", self.endpoint, file.repo, file.path);
        for _ in 0..5 {
            let mut request = client.head(&url);
            if let Some(token) = &self.token {
                request = request.header(AUTHORIZATION, format!("Bearer {token}"));
            }
            let response = request.send().await.map_err(|e| Failure::Passing(unreachable_because(&e), None))?;
            let headers = response.headers();
            if let Some(failure) = refusal(response.status(), headers, file) {
                return Err(failure);
            }
            let location = header(headers, LOCATION.as_str());
            match location.filter(|l| response.status().is_redirection() && l.starts_with('/') && !l.starts_with("//"))
            {
                Some(location) => url = format!("{}{location}", self.endpoint),
                None => return remote(headers),
            }
        }
        Err(Failure::Final("the hub redirects in a circle".into()))
    }

    /// Streams what is missing of a file.
    async fn rest(
        &self,
        file: &ModelFile,
        remote: &Remote,
        part: &mut Part,
        transfer: &mut Transfer<'_>,
    ) -> std::result::Result<(), Failure> {
        if part.have > remote.size {
            part.restart().map_err(|e| Failure::Disk(fsio::explain(e, &part.path)))?;
        }
        (transfer.progress)(part.have, remote.size);
        if part.have == remote.size {
            return Ok(());
        }
        let (owner, name) = hf_hub::split_id(&file.repo);
        let repo = self.client().map_err(|e| failure(&e, file))?.model(owner, name);
        let stream = repo.download_file_stream().filename(file.path.clone()).range(part.have..remote.size).send();
        let silent = |_| Failure::Passing(format!("the hub was silent for {} s", SILENCE.as_secs()), None);
        let (_, mut stream) =
            tokio::time::timeout(SILENCE, stream).await.map_err(silent)?.map_err(|e| failure(&e, file))?;
        loop {
            if transfer.stop.load(Ordering::Relaxed) {
                return Err(Failure::Stopped);
            }
            let Some(chunk) = tokio::time::timeout(SILENCE, stream.next()).await.map_err(silent)? else { break };
            let chunk = chunk.map_err(|e| failure(&e, file))?;
            if part.have + chunk.len() as u64 > remote.size {
                return Err(Failure::Final("the server sends more than was asked for".into()));
            }
            part.write(&chunk).map_err(|e| Failure::Disk(disk_failure(e, part)))?;
            (transfer.progress)(part.have, remote.size);
        }
        match part.have == remote.size {
            true => Ok(()),
            false => {
                let what = format!("the connection ended after {} of {} bytes", part.have, remote.size);
                Err(Failure::Passing(what, None))
            }
        }
    }

    fn client(&self) -> hf_hub::HFResult<HFClient> {
        // Trying again is done here, from where the last try ended.
        let builder = HFClientBuilder::new().endpoint(self.endpoint.clone()).cache_enabled(false).retry_max_attempts(0);
        match &self.token {
            Some(token) => builder.token(token.clone()),
            None => builder,
        }
        .build()
    }

    fn explain(&self, file: &ModelFile, dir: &Path, failure: Failure) -> anyhow::Error {
        match failure {
            Failure::Final(why) | Failure::Passing(why, _) => self.failed(file, dir, &why),
            Failure::Disk(error) => error,
            Failure::Stopped => {
                UserError { exit: 130, ..UserError::new(format!("stopped while downloading {}", file.name)) }
                    .hint("run the same command again: it goes on from what has arrived")
                    .into()
            }
        }
    }

    fn failed(&self, file: &ModelFile, dir: &Path, why: &str) -> anyhow::Error {
        let target = dir.join(&file.name);
        UserError::new(format!("{} could not be downloaded: {why}", file.path))
            .hint(format!("download {} by hand and save it as {}", page(file), target.display()))
            .into()
    }
}

/// Bytes of a file that an earlier download has left behind.
pub fn waiting(file: &ModelFile, remote: &Remote, dir: &Path) -> u64 {
    part(file, remote, dir).metadata().map_or(0, |m| m.len())
}

/// Where an unfinished download waits: the name holds the hash, so that a file that changes on the hub starts anew.
fn part(file: &ModelFile, remote: &Remote, dir: &Path) -> PathBuf {
    let mark = remote.sha256.as_deref().map_or(format!("{}", remote.size), |hash| hash.chars().take(16).collect());
    dir.join(STAGING).join(format!("{}.{mark}.part", file.name.replace('/', "_")))
}

/// An unfinished download, held by one process at a time.
struct Part {
    path: PathBuf,
    file: File,
    have: u64,
    sum: Sha256,
}

impl Part {
    fn open(path: &Path, stop: &AtomicBool) -> std::result::Result<Self, Failure> {
        let disk = |e: std::io::Error| Failure::Disk(fsio::explain(e, path));
        let mut file = File::options().read(true).write(true).create(true).truncate(false).open(path).map_err(disk)?;
        // File systems without locks answer with an error: there nobody else can be seen.
        if let Ok(false) = FileExt::try_lock_exclusive(&file) {
            return Err(Failure::Final("another program is downloading it just now".into()));
        }
        // What is there counts towards the hash.
        let (mut sum, mut have, mut buffer) = (Sha256::new(), 0, vec![0u8; BUFFER]);
        loop {
            if stop.load(Ordering::Relaxed) {
                return Err(Failure::Stopped);
            }
            match file.read(&mut buffer).map_err(disk)? {
                0 => break,
                n => {
                    sum.update(&buffer[..n]);
                    have += n as u64;
                }
            }
        }
        Ok(Self { path: path.to_path_buf(), file, have, sum })
    }

    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        if let Err(e) = self.file.write_all(bytes) {
            // A write that failed half-way must not count.
            let _ = self.file.set_len(self.have);
            return Err(e);
        }
        self.sum.update(bytes);
        self.have += bytes.len() as u64;
        Ok(())
    }

    fn restart(&mut self) -> std::io::Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        (self.have, self.sum) = (0, Sha256::new());
        Ok(())
    }

    fn hash(&self) -> String {
        hex(&self.sum.clone().finalize())
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

fn disk_failure(e: std::io::Error, part: &Part) -> anyhow::Error {
    if matches!(e.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded) {
        return UserError::new(format!("the disk is full: {} could not be written", part.path.display()))
            .hint("free some space and run the same command again: it goes on from what has arrived")
            .into();
    }
    fsio::explain(e, &part.path)
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn remote(headers: &HeaderMap) -> std::result::Result<Remote, Failure> {
    let size = header(headers, "x-linked-size").or_else(|| header(headers, CONTENT_LENGTH.as_str()));
    let Some(size) = size.and_then(|s| s.parse().ok()) else {
        return Err(Failure::Final("the hub does not say how large it is".into()));
    };
    let tag = header(headers, "x-linked-etag").or_else(|| header(headers, ETAG.as_str())).unwrap_or_default();
    let tag = tag.trim_start_matches("W/").trim_matches('"');
    let is_hash = tag.len() == 64 && tag.chars().all(|c| c.is_ascii_hexdigit());
    Ok(Remote { size, sha256: is_hash.then(|| tag.to_lowercase()) })
}

/// What to do about a file that the hub does not hand to everybody.
fn login(file: &ModelFile, allowed: bool) -> String {
    let repo = &file.repo;
    match allowed {
        true => format!("the hub wants a login for it: accept the terms on https://huggingface.co/{repo}, make a token on https://huggingface.co/settings/tokens, and give it with --hf_token or HF_TOKEN"),
        false => format!("this token may not read it: accept the terms on https://huggingface.co/{repo} with the account that the token belongs to, and let the token read gated repositories"),
    }
}

fn refusal(status: StatusCode, headers: &HeaderMap, file: &ModelFile) -> Option<Failure> {
    let after = || header(headers, "retry-after").and_then(|s| s.parse().ok()).map(Duration::from_secs);
    match status.as_u16() {
        ..=399 => None,
        401 => Some(Failure::Final(login(file, true))),
        403 => Some(Failure::Final(login(file, false))),
        404 => Some(Failure::Final("the hub has no such file".into())),
        429 => Some(Failure::Passing("the hub asks to come back later (too many requests)".into(), after())),
        500.. => Some(Failure::Passing(format!("the hub is out of order ({status})"), after())),
        _ => Some(Failure::Final(format!("the hub answers {status}"))),
    }
}

fn failure(e: &HFError, file: &ModelFile) -> Failure {
    let none = HeaderMap::new();
    let by_status = |status: StatusCode| refusal(status, &none, file);
    match e {
        HFError::AuthRequired { .. } => Failure::Final(login(file, true)),
        HFError::Forbidden { .. } => Failure::Final(login(file, false)),
        HFError::RepoNotFound { .. } | HFError::EntryNotFound { .. } | HFError::RevisionNotFound { .. } => {
            Failure::Final("the hub has no such file".into())
        }
        HFError::RateLimited { retry_after, .. } => {
            Failure::Passing("the hub asks to come back later (too many requests)".into(), *retry_after)
        }
        HFError::Http { context } => by_status(context.status)
            .unwrap_or_else(|| Failure::Passing(format!("the hub answers {}", context.status), None)),
        other => Failure::Passing(unreachable_because(other), None),
    }
}

/// The innermost cause says most ("connection refused"); the layers above repeat the address.
fn unreachable_because(e: &dyn std::error::Error) -> String {
    let mut cause = e;
    while let Some(source) = cause.source() {
        cause = source;
    }
    format!("the hub cannot be reached ({cause})")
}
