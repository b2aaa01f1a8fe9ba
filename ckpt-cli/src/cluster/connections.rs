//! The TCP connections of processes, found in /proc: enough to tell, before the freeze, whether a
//! connection leads out of the job.

use ckpt_common::wire::Connection;
use procfs::{
    net::{TcpNetEntry, TcpState},
    process::{FDTarget, Process},
};
use std::collections::{HashMap, HashSet};

/// Connections of these processes, each once. A process that ends meanwhile has none.
pub(super) fn of(pids: &[i32]) -> Vec<Connection> {
    let (mut found, mut seen) = (Vec::new(), HashSet::new());
    // One table per network namespace, though the file is found by process.
    let mut tables: HashMap<u64, HashMap<u64, TcpNetEntry>> = HashMap::new();
    for &pid in pids {
        let Ok(process) = Process::new(pid) else { continue };
        let Ok(namespaces) = process.namespaces() else { continue };
        let network =
            namespaces.0.get(std::ffi::OsStr::new("net")).map_or(0, |namespace| namespace.identifier);
        let table = tables.entry(network).or_insert_with(|| table(&process));
        for descriptor in process.fd().into_iter().flatten().flatten() {
            let FDTarget::Socket(inode) = descriptor.target else { continue };
            let Some(entry) = table.get(&inode).filter(|_| seen.insert((network, inode))) else { continue };
            found.push(Connection {
                pid,
                fd: descriptor.fd,
                local: entry.local_address,
                remote: entry.remote_address,
                peer_closed: matches!(
                    entry.state,
                    TcpState::CloseWait | TcpState::LastAck | TcpState::Closing | TcpState::TimeWait
                ),
            });
        }
    }
    found
}

/// Sockets with a connection, by inode.
fn table(process: &Process) -> HashMap<u64, TcpNetEntry> {
    let all = process.tcp().into_iter().flatten().chain(process.tcp6().into_iter().flatten());
    let connected = all.filter(|entry| {
        !matches!(entry.state, TcpState::Listen | TcpState::SynSent | TcpState::Close | TcpState::NewSynRecv)
    });
    connected.map(|entry| (entry.inode, entry)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Shutdown, TcpListener, TcpStream};

    #[test]
    fn connections_are_found_once_and_listeners_are_none() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let client = TcpStream::connect(address).unwrap();
        let (server, _) = listener.accept().unwrap();
        let copy = client.try_clone().unwrap();
        server.shutdown(Shutdown::Write).unwrap();
        let found = || {
            let all = of(&[std::process::id() as i32]);
            all.into_iter().filter(|c| c.local == address || c.remote == address).collect::<Vec<_>>()
        };
        while !found().iter().any(|connection| connection.peer_closed) {
            std::thread::yield_now();
        }
        let mut found = found();
        found.sort_by_key(|connection| connection.local == address);
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].remote, found[0].peer_closed), (address, true));
        assert_eq!((found[1].local, found[1].peer_closed), (address, false));
        drop(copy);
    }
}
