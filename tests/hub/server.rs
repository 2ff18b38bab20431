//! A hub: `HEAD` and `GET` on `/owner/name/resolve/main/path` answer with a redirect to the store, the store serves
//! ranges, repositories can be gated, and faults can be put in the way.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

/// What goes wrong with one answer of the store.
#[derive(Debug, Clone)]
pub enum Fault {
    /// This status, with further header lines.
    Status(&'static str, &'static str),
    /// The connection ends after so many bytes of the body.
    CutAfter(usize),
    /// The same number of other bytes.
    Garbage,
    /// The whole file, whatever range was asked for.
    IgnoresRange,
}

#[derive(Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    /// By file: what happens to the next requests for its content.
    faults: BTreeMap<String, VecDeque<Fault>>,
    gated: BTreeMap<String, &'static str>,
    /// Sizes that are announced instead of the true ones.
    announced: BTreeMap<String, u64>,
    /// `METHOD path range`, in the order of arrival.
    log: Vec<String>,
}

#[derive(Clone)]
pub struct Server {
    address: String,
    state: Arc<Mutex<State>>,
}

impl Server {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let server = Self { address, state: Arc::default() };
        let own = server.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let own = own.clone();
                std::thread::spawn(move || own.answer(stream));
            }
        });
        server
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// A file of a repository: `owner/name/path`.
    pub fn add(&self, path: &str, content: &[u8]) {
        self.state.lock().unwrap().files.insert(path.into(), content.to_vec());
    }

    pub fn fault(&self, path: &str, fault: Fault) {
        self.state.lock().unwrap().faults.entry(path.into()).or_default().push_back(fault);
    }

    /// From now on the repository wants this token.
    pub fn gate(&self, repo: &str, token: &'static str) {
        self.state.lock().unwrap().gated.insert(repo.into(), token);
    }

    pub fn announce(&self, path: &str, size: u64) {
        self.state.lock().unwrap().announced.insert(path.into(), size);
    }

    pub fn log(&self) -> Vec<String> {
        self.state.lock().unwrap().log.clone()
    }

    fn answer(&self, stream: TcpStream) -> Option<()> {
        let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
        let request = lines.next()?;
        let headers: BTreeMap<String, String> = lines
            .take_while(|l| !l.is_empty())
            .filter_map(|l| l.split_once(": ").map(|(k, v)| (k.to_lowercase(), v.to_owned())))
            .collect();
        let mut words = request.split(' ');
        let (method, path) = (words.next()?.to_owned(), words.next()?.trim_start_matches('/').to_owned());
        let range = headers.get("range").cloned().unwrap_or_default();
        self.state.lock().unwrap().log.push(format!("{method} {path} {range}").trim_end().to_owned());
        let (head, body) = match path.strip_prefix("store/") {
            Some(file) => self.store(file, &range, method == "HEAD")?,
            None => (self.hub(&path, headers.get("authorization").map(String::as_str)), Vec::new()),
        };
        let mut out = &stream;
        out.write_all(head.as_bytes()).ok()?;
        if method != "HEAD" {
            out.write_all(&body).ok()?;
        }
        out.flush().ok()
    }

    /// The hub itself: says what a file is, and where it lies.
    fn hub(&self, path: &str, authorization: Option<&str>) -> String {
        let state = self.state.lock().unwrap();
        let empty = |status: &str, more: &str| {
            format!("HTTP/1.1 {status}\r\n{more}Content-Length: 0\r\nConnection: close\r\n\r\n")
        };
        let Some((repo, file)) = path.split_once("/resolve/main/") else { return empty("404 Not Found", "") };
        if let Some(token) = state.gated.get(repo) {
            match authorization.and_then(|a| a.strip_prefix("Bearer ")) {
                None => return empty("401 Unauthorized", "X-Error-Code: GatedRepo\r\n"),
                Some(given) if given != *token => return empty("403 Forbidden", "X-Error-Code: GatedRepo\r\n"),
                Some(_) => {}
            }
        }
        // A repository that was renamed: the hub redirects within itself, without a word on the file.
        if let Some(name) = repo.strip_prefix("Old/") {
            return empty("307 Temporary Redirect", &format!("Location: /New/{name}/resolve/main/{file}\r\n"));
        }
        let key = format!("{repo}/{file}");
        let Some(content) = state.files.get(&key) else {
            return empty("404 Not Found", "X-Error-Code: EntryNotFound\r\n");
        };
        let hash: String = Sha256::digest(content).iter().map(|b| format!("{b:02x}")).collect();
        let more = format!(
            "Location: {}/store/{key}\r\nX-Repo-Commit: 0123456789012345678901234567890123456789\r\nX-Linked-Size: {}\r\nX-Linked-Etag: \"{hash}\"\r\nETag: \"something else\"\r\n",
            self.address,
            state.announced.get(&key).copied().unwrap_or(content.len() as u64)
        );
        empty("302 Found", &more)
    }

    /// The store behind it: content, by ranges.
    fn store(&self, file: &str, range: &str, head: bool) -> Option<(String, Vec<u8>)> {
        let mut state = self.state.lock().unwrap();
        let content = state.files.get(file)?.clone();
        let fault = if head { None } else { state.faults.get_mut(file).and_then(VecDeque::pop_front) };
        drop(state);
        if let Some(Fault::Status(status, more)) = fault {
            return Some((
                format!("HTTP/1.1 {status}\r\n{more}Content-Length: 0\r\nConnection: close\r\n\r\n"),
                Vec::new(),
            ));
        }
        let span = range.strip_prefix("bytes=").and_then(|r| {
            let (from, to) = r.split_once('-')?;
            Some((from.parse::<usize>().ok()?, to.parse::<usize>().ok()?.min(content.len() - 1)))
        });
        let span = span.filter(|_| !matches!(fault, Some(Fault::IgnoresRange)));
        let (status, mut body) = match span {
            Some((from, to)) => ("206 Partial Content", content[from..=to].to_vec()),
            None => ("200 OK", content),
        };
        let length = body.len();
        match fault {
            Some(Fault::CutAfter(n)) => body.truncate(n),
            Some(Fault::Garbage) => body.iter_mut().for_each(|b| *b = !*b),
            _ => {}
        }
        Some((format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"), body))
    }
}
