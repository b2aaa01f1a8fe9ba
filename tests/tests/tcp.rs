//! TCP sockets, captured on two nodes and rebuilt on two others with other addresses.
#![expect(clippy::print_stdout, reason = "times are for people to look at, not to assert on")]

use anyhow::{Context, Result, ensure};
use ckpt_cli::network::addresses::AddressMap;
use ckpt_cli::network::hold::{Hold, SocketCookie};
use ckpt_cli::objects::tcp::{self, CaptureError, Rebuilt};
use ckpt_common::image::tcp::{TcpSocket, TcpState};
use ckpt_tests::cluster::{Cluster, Node};
use ckpt_tests::stream::{End, check_both, ends};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::thread::sleep;
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_millis(100);
const FULL: usize = 16 << 20;

/// Four nodes: sockets are made on 1 and 2 and rebuilt on 3 and 4.
struct Moved {
    cluster: Cluster,
    map: AddressMap,
}

impl Moved {
    fn new() -> Result<Self> {
        let cluster = Cluster::start(4)?;
        let pairs = [(1, 3), (2, 4)].map(|(old, new)| (cluster.node(old), cluster.node(new)));
        let four = pairs.iter().map(|(old, new)| (IpAddr::from(old.ip4), IpAddr::from(new.ip4)));
        let six = pairs.iter().map(|(old, new)| (IpAddr::from(old.ip6), IpAddr::from(new.ip6)));
        let map = four.chain(six).collect();
        Ok(Self { cluster, map })
    }

    fn node(&self, number: usize) -> &Node {
        self.cluster.node(number)
    }

    /// A connection from node 1 to node 2, `address` being one of node 2's.
    fn connection(&self, address: IpAddr) -> Result<(TcpStream, TcpStream)> {
        let listener = self.node(2).in_network(|| TcpListener::bind((address, 0)))??;
        let to: SocketAddr = listener.local_addr()?;
        let one = self.node(1).in_network(|| TcpStream::connect(to))??;
        Ok((one, listener.accept()?.0))
    }

    fn rebuild(
        &self,
        number: usize,
        socket: &TcpSocket,
        peer: Option<&TcpSocket>,
    ) -> Result<(Rebuilt, OwnedFd)> {
        let position = peer.and_then(TcpSocket::position);
        let rebuilt =
            self.node(number).in_network(|| tcp::rebuild(socket, &self.map, position.as_ref()))??;
        let ours = rebuilt.fd().try_clone_to_owned()?;
        Ok((rebuilt, ours))
    }

    /// Rebuilds both ends, and tells how long it took from the barrier to the end.
    fn rebuild_both(&self, one: &TcpSocket, two: &TcpSocket) -> Result<(TcpStream, TcpStream, Duration)> {
        let (first, first_fd) = self.rebuild(3, one, Some(two))?;
        let (second, second_fd) = self.rebuild(4, two, Some(one))?;
        let start = Instant::now();
        first.connect()?;
        second.connect()?;
        Ok((first_fd.into(), second_fd.into(), start.elapsed()))
    }

    /// The whole way for one connection: both ends live on, on other nodes, under other addresses.
    fn go(&self, one: &mut End, two: &mut End) -> Result<Duration> {
        let records = capture_both(&one.stream, &two.stream)?;
        for end in [&*one, &*two] {
            tcp::silence(end.stream.as_fd())?;
        }
        let (new_one, new_two, time) = self.rebuild_both(&records.0, &records.1)?;
        one.stream = new_one;
        two.stream = new_two;
        Ok(time)
    }
}

/// No traffic is held: first both sending halves, then both receiving ones.
fn capture_both(one: &TcpStream, two: &TcpStream) -> Result<(TcpSocket, TcpSocket)> {
    let halves = (tcp::capture_sending(one.as_fd())?, tcp::capture_sending(two.as_fd())?);
    Ok((halves.0.receiving(one.as_fd())?, halves.1.receiving(two.as_fd())?))
}

fn addresses(node: &Node) -> [IpAddr; 3] {
    [node.ip4.into(), node.ip6.into(), IpAddr::V6(node.ip4.to_ipv6_mapped())]
}

#[test]
fn connections_move_with_all_queues_full() -> Result<()> {
    let moved = Moved::new()?;
    for (seed, address) in addresses(moved.node(2)).into_iter().enumerate() {
        let (one, two) = moved.connection(address)?;
        let (mut one, mut two) = ends(one, two, 10 * seed as u64);
        // Nobody reads: both receive queues fill, both windows close, both send queues fill.
        for end in [&mut one, &mut two] {
            for _ in 0..20 {
                end.write(FULL)?;
                sleep(Duration::from_millis(10));
            }
        }
        let before = one.stream.local_addr()?;
        let time = moved.go(&mut one, &mut two)?;
        let after = one.stream.local_addr()?;
        assert_eq!(after.ip().to_canonical(), moved.map.ip(before.ip().to_canonical()));
        assert_eq!(after.port(), before.port());
        assert_eq!(two.stream.peer_addr()?.port(), after.port());
        check_both(&mut one, &mut two)?;
        println!("{address}: {} and {} bytes written, connected in {time:?}", one.written.1, two.written.1);
    }
    Ok(())
}

#[test]
fn a_reader_that_was_slow_gets_everything() -> Result<()> {
    let moved = Moved::new()?;
    for read_before in [0, 1, 50_000, 2_000_000] {
        let (one, two) = moved.connection(moved.node(2).ip4.into())?;
        let (mut one, mut two) = ends(one, two, 7);
        while one.write(FULL)? > 0 {
            sleep(Duration::from_millis(20));
        }
        while two.read.1 < read_before && two.read(SOON)?.is_some() {
            one.write(100_000)?;
        }
        moved.go(&mut one, &mut two)?;
        // The window opens bit by bit; nothing that was announced before may be taken back.
        let mut small = vec![0; 1000];
        for _ in 0..50 {
            two.stream.read_exact(&mut small)?;
            let (seed, at) = two.read;
            ensure!(small.iter().zip(at..).all(|(got, at)| *got == ckpt_tests::stream::byte(seed, at)));
            two.read.1 += 1000;
        }
        check_both(&mut one, &mut two)?;
    }
    Ok(())
}

/// Fifty connections, written and read at full speed in both directions.
struct Fifty {
    ends: Vec<End>,
}

impl Fifty {
    fn new(moved: &Moved) -> Result<Self> {
        let mut all = Vec::new();
        for number in 0..50 {
            let (one, two) = moved.connection(addresses(moved.node(2))[number % 3])?;
            let (one, two) = ends(one, two, 2 * number as u64);
            all.extend([one, two]);
        }
        Ok(Self { ends: all })
    }

    /// One thread per end does some work.
    fn all<T: Send>(&mut self, work: impl Fn(usize, &mut End) -> Result<T> + Sync) -> Result<Vec<T>> {
        let work = &work;
        std::thread::scope(|scope| {
            let start = |(index, end)| scope.spawn(move || work(index, end));
            let threads: Vec<_> = self.ends.iter_mut().enumerate().map(start).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        })
    }

    fn run(&mut self, time: Duration) -> Result<()> {
        let stop = Instant::now() + time;
        self.all(|_, end| {
            while Instant::now() < stop {
                end.write(300_000)?;
                // Some read less often than the others: their queues fill.
                if !end.read.0.is_multiple_of(3) || !end.written.1.is_multiple_of(4) {
                    end.read(Duration::from_millis(1))?;
                }
            }
            Ok(())
        })
        .map(drop)
    }

    /// Nobody writes any more; the kernel goes on. Captures everything.
    fn capture(&self, hold: bool) -> Result<(Vec<TcpSocket>, Hold)> {
        let mut holding = Hold::load()?;
        let all = &self.ends;
        if hold {
            let cookies = all.iter().map(|end| SocketCookie::of(&end.stream));
            holding.add(cookies.collect::<Result<Vec<_>, _>>()?)?;
            let captured = all.iter().map(|end| tcp::capture(end.stream.as_fd()));
            return Ok((captured.collect::<Result<_, _>>()?, holding));
        }
        let halves = all.iter().map(|end| tcp::capture_sending(end.stream.as_fd()));
        let halves: Vec<_> = halves.collect::<Result<_, _>>()?;
        let second = halves.into_iter().zip(all).map(|(half, end)| half.receiving(end.stream.as_fd()));
        Ok((second.collect::<Result<_, _>>()?, holding))
    }

    /// How long it takes until each end has read something that was under way at the cut.
    fn stall(&mut self, records: &[TcpSocket], start: Instant) -> Result<Duration> {
        let times = self.all(|index, end| {
            let (us, other) = (&records[index], &records[index ^ 1]);
            let positions = (us.position().context("us")?, other.position().context("other")?);
            if positions.1.in_flight(&positions.0)?.bytes > 0 {
                let received = us.stream().context("us")?.receiving.queue.len() as u64;
                let target = end.read.1 + received + 1;
                while end.read.1 < target {
                    end.read(Duration::from_secs(20))?.context("nothing comes")?;
                }
            }
            Ok(start.elapsed())
        })?;
        Ok(times.into_iter().max().unwrap_or_default())
    }

    fn check(&mut self) -> Result<()> {
        self.run(Duration::from_millis(200))?;
        for pair in self.ends.chunks_mut(2) {
            let [one, two] = pair else { unreachable!() };
            check_both(one, two)?;
        }
        Ok(())
    }
}

fn in_flight(records: &[TcpSocket]) -> Result<u32> {
    let mut sum = 0;
    for pair in records.chunks(2) {
        let (one, two) = (pair[0].position().context("one")?, pair[1].position().context("two")?);
        sum += one.in_flight(&two)?.bytes + two.in_flight(&one)?.bytes;
    }
    Ok(sum)
}

fn fifty_connections_move(hold: bool) -> Result<()> {
    let moved = Moved::new()?;
    let mut fifty = Fifty::new(&moved)?;
    fifty.run(Duration::from_millis(500))?;
    let start = Instant::now();
    let (records, holding) = fifty.capture(hold)?;
    let captured = start.elapsed();
    for end in &fifty.ends {
        tcp::silence(end.stream.as_fd())?;
    }
    let mut rebuilt = Vec::new();
    for (index, record) in records.iter().enumerate() {
        let (socket, fd) = moved.rebuild(3 + index % 2, record, Some(&records[index ^ 1]))?;
        fifty.ends[index].stream = fd.into();
        rebuilt.push(socket);
    }
    let dropped = holding.release()?;
    let start = Instant::now();
    rebuilt.into_iter().try_for_each(Rebuilt::connect)?;
    let connected = start.elapsed();
    let stall = fifty.stall(&records, start)?;
    println!(
        "50 connections moved, hold {hold}: captured in {captured:?}, {} bytes in flight, {dropped:?}, connected \
         in {connected:?}, all of it moving after {stall:?}",
        in_flight(&records)?
    );
    fifty.check()
}

#[test]
fn fifty_busy_connections_move_under_a_hold() -> Result<()> {
    fifty_connections_move(true)
}

#[test]
fn fifty_busy_connections_move_without_a_hold() -> Result<()> {
    fifty_connections_move(false)
}

#[test]
fn fifty_busy_connections_go_on_after_a_capture() -> Result<()> {
    let moved = Moved::new()?;
    let mut fifty = Fifty::new(&moved)?;
    for round in 0..6 {
        let hold = round % 2 == 1;
        fifty.run(Duration::from_millis(200))?;
        let start = Instant::now();
        let (records, holding) = fifty.capture(hold)?;
        let captured = start.elapsed();
        let dropped = holding.release()?;
        let stall = fifty.stall(&records, Instant::now())?;
        println!(
            "50 connections left running, hold {hold}: captured in {captured:?}, {} bytes in flight, {dropped:?}, \
             all of it moving after {stall:?}",
            in_flight(&records)?
        );
    }
    fifty.check()
}

#[test]
fn a_captured_connection_goes_on_where_it_is() -> Result<()> {
    let moved = Moved::new()?;
    let (one, two) = moved.connection(moved.node(2).ip6.into())?;
    let (mut one, mut two) = ends(one, two, 3);
    for round in 0..5 {
        one.write(1_000_000)?;
        two.write(1_000_000)?;
        let first = tcp::capture(one.stream.as_fd())?;
        let second = tcp::capture(two.stream.as_fd())?;
        assert_eq!(first.settings.reuse_address, tcp::capture(one.stream.as_fd())?.settings.reuse_address);
        ensure!(first.stream().is_some() && second.settings.reuse_address, "round {round}");
        check_both(&mut one, &mut two)?;
    }
    Ok(())
}

#[test]
fn half_closed_connections_move() -> Result<()> {
    let moved = Moved::new()?;
    for data in [0, 100, FULL] {
        for (first, second) in [(true, false), (false, true), (true, true)] {
            let (one, two) = moved.connection(moved.node(2).ip4.into())?;
            let (mut one, mut two) = ends(one, two, 5);
            // With a lot of data the ends of the streams wait behind closed windows.
            for (end, shut) in [(&mut one, first), (&mut two, second)] {
                end.write(data)?;
                if shut {
                    end.stream.shutdown(Shutdown::Write)?;
                }
            }
            sleep(Duration::from_millis(10));
            let what = format!("{data} bytes, shut {first} {second}");
            if first && second && data < FULL {
                // Everything has arrived: each socket has ended for itself.
                for end in [&mut one, &mut two] {
                    let record = tcp::capture(end.stream.as_fd())?;
                    ensure!(
                        matches!(&record.state, TcpState::Ended { error: false, .. }),
                        "{what}: {record:?}"
                    );
                    let (rebuilt, fd) = moved.rebuild(3, &record, None)?;
                    rebuilt.connect()?;
                    end.stream = fd.into();
                    ensure!(end.stream.write(b"x").is_err(), "{what}: writing after the end");
                }
            } else {
                moved.go(&mut one, &mut two).context(what.clone())?;
            }
            let written = (one.written.1, two.written.1);
            for (end, other, other_shut) in [(&mut one, written.1, second), (&mut two, written.0, first)] {
                end.read_to(other).context(what.clone())?;
                if other_shut {
                    end.read_end().context(what.clone())?;
                }
            }
            for (end, shut) in [(&mut one, first), (&mut two, second)] {
                ensure!(shut || end.write(500)? == 500, "{what}");
            }
            let written = (one.written.1, two.written.1);
            for (end, other) in [(&mut one, written.1), (&mut two, written.0)] {
                end.read_to(other).context(what.clone())?;
            }
        }
    }
    Ok(())
}

#[test]
fn the_end_of_a_closed_peer_arrives() -> Result<()> {
    let moved = Moved::new()?;
    let (one, two) = moved.connection(moved.node(2).ip4.into())?;
    let (mut one, mut two) = ends(one, two, 9);
    one.write(10_000)?;
    let peer = two.stream.peer_addr()?;
    drop(one);
    sleep(Duration::from_millis(10));
    let record = tcp::capture(two.stream.as_fd())?;
    let stand_in = record.closed_peer().context("the end has arrived")?;
    tcp::silence(two.stream.as_fd())?;
    let (first, _) = moved.rebuild(3, &stand_in, Some(&record))?;
    let (second, fd) = moved.rebuild(4, &record, Some(&stand_in))?;
    first.connect()?;
    second.connect()?;
    two.stream = fd.into();
    assert_eq!(two.stream.peer_addr()?.port(), peer.port());
    two.read_to(10_000)?;
    two.read_end()
}

#[test]
fn listening_sockets_move_and_accept() -> Result<()> {
    let moved = Moved::new()?;
    for address in [moved.node(2).ip4.into(), IpAddr::V6(Ipv6Addr::UNSPECIFIED)] {
        let listener = moved.node(2).in_network(|| TcpListener::bind((address, 0)))??;
        let port = listener.local_addr()?.port();
        let target = |node: usize| SocketAddr::from((moved.node(node).ip4, port));
        let one = moved.node(1).in_network(|| TcpStream::connect(target(2)))??;
        sleep(SOON);
        let waiting = tcp::capture(listener.as_fd()).unwrap_err();
        ensure!(matches!(waiting, CaptureError::Backlog(1)) && waiting.is_transient(), "{waiting}");
        let two = listener.accept()?.0;
        let (mut one, mut two) = ends(one, two, 1);
        one.write(100)?;
        let record = tcp::capture(listener.as_fd())?;
        ensure!(matches!(record.state, TcpState::Listening { backlog: 128.. }), "{:?}", record.state);
        let (rebuilt, fd) = moved.rebuild(4, &record, None)?;
        // The connection that was accepted there has the same port.
        moved.go(&mut one, &mut two)?;
        rebuilt.connect()?;
        check_both(&mut one, &mut two)?;
        let listener = TcpListener::from(fd);
        let one = moved.node(3).in_network(|| TcpStream::connect(target(4)))??;
        let (mut one, mut two) = ends(one, listener.accept()?.0, 3);
        check_both(&mut one, &mut two)?;
    }
    Ok(())
}

#[test]
fn connecting_sockets_connect_at_the_new_address() -> Result<()> {
    let moved = Moved::new()?;
    let listen =
        |node: usize, port| moved.node(node).in_network(|| TcpListener::bind((moved.node(node).ip4, port)));
    let old = listen(2, 0)??;
    let port = old.local_addr()?.port();
    let mut hold = Hold::load()?;
    hold.add([SocketCookie::of(&old)?])?;
    let connecting = moved.node(1).in_network(|| {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, connect, socket};
        let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_NONBLOCK, None)?;
        let address = SockaddrIn::from(std::net::SocketAddrV4::new(moved.node(2).ip4, port));
        let result = connect(std::os::fd::AsRawFd::as_raw_fd(&fd), &address);
        ensure!(result == Err(nix::errno::Errno::EINPROGRESS), "{result:?}");
        // /proc/self/net/tcp is of the thread group's leader: the agent's own network, in real life.
        match tcp::capture(fd.as_fd()) {
            Err(error) => ensure!(error.to_string().contains("network namespace"), "{error}"),
            Ok(record) => ensure!(matches!(record.state, TcpState::Connecting { .. }), "{record:?}"),
        }
        Ok(fd)
    })??;
    let local = TcpStream::from(connecting).local_addr()?;
    let record = TcpSocket {
        ipv6: false,
        local: Some(local.into()),
        settings: tcp::capture(old.as_fd())?.settings,
        state: TcpState::Connecting { peer: old.local_addr()?.into() },
    };
    let listener = listen(4, port)??;
    let (rebuilt, fd) = moved.rebuild(3, &record, None)?;
    rebuilt.connect()?;
    let (two, peer) = listener.accept()?;
    assert_eq!(peer, SocketAddr::from((moved.node(3).ip4, local.port())));
    let (mut one, mut two) = ends(fd.into(), two, 1);
    check_both(&mut one, &mut two)
}

#[test]
fn settings_come_back() -> Result<()> {
    use nix::sys::socket::{setsockopt, sockopt};
    let moved = Moved::new()?;
    let (one, two) = moved.connection(moved.node(2).ip6.into())?;
    setsockopt(&one, sockopt::TcpNoDelay, &true)?;
    setsockopt(&one, sockopt::KeepAlive, &true)?;
    setsockopt(&one, sockopt::TcpKeepIdle, &77)?;
    setsockopt(&one, sockopt::TcpKeepInterval, &7)?;
    setsockopt(&one, sockopt::TcpKeepCount, &3)?;
    setsockopt(&one, sockopt::TcpUserTimeout, &12345)?;
    setsockopt(&one, sockopt::SndBuf, &100_000)?;
    ckpt_cli::sys::socket::set(one.as_fd(), libc::SOL_SOCKET, libc::SO_RCVTIMEO, &[3_i64, 500])?;
    setsockopt(&one, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 9 })?;
    setsockopt(&one, sockopt::Ipv6TClass, &0x20)?;
    setsockopt(&one, sockopt::Mark, &5)?;
    setsockopt(&one, sockopt::Priority, &3)?;
    setsockopt(&one, sockopt::TcpCongestion, &"reno".into())?;
    ckpt_cli::sys::socket::set(one.as_fd(), libc::SOL_SOCKET, libc::SO_RCVLOWAT, &2)?;
    setsockopt(&one, sockopt::OobInline, &true)?;
    setsockopt(&one, sockopt::BindToDevice, &"eth0".into())?;
    let mut records = capture_both(&one, &two)?;
    ensure!(records.0.settings.options.len() >= 13, "{:?}", records.0.settings);
    assert_eq!(records.0.settings.buffer_locks, 1);
    let (new_one, new_two, _) = moved.rebuild_both(&records.0, &records.1)?;
    let mut again = capture_both(&new_one, &new_two)?;
    // The kernel sets it for IPv6 sockets that are bound, as all rebuilt ones are.
    for record in [&mut records.0, &mut records.1, &mut again.0, &mut again.1] {
        record
            .settings
            .options
            .retain(|option| (option.level, option.name) != (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY));
    }
    assert_eq!(again.0.settings, records.0.settings);
    assert_eq!(again.1.settings, records.1.settings);
    let agreed = |record: &TcpSocket| {
        let stream = record.stream().expect("connected");
        (stream.max_segment, stream.window_scales, stream.sack, stream.timestamp.is_some())
    };
    assert_eq!(agreed(&again.0), agreed(&records.0));
    assert_eq!(agreed(&again.1), agreed(&records.1));
    Ok(())
}

#[test]
fn broken_connections_stay_broken() -> Result<()> {
    let moved = Moved::new()?;
    let (one, two) = moved.connection(moved.node(2).ip4.into())?;
    let (mut one, mut two) = ends(one, two, 1);
    one.write(1234)?;
    let cut_off = tcp::capture(two.stream.as_fd())?.broken();
    nix::sys::socket::setsockopt(
        &one.stream,
        nix::sys::socket::sockopt::Linger,
        &libc::linger { l_onoff: 1, l_linger: 0 },
    )?;
    drop(one);
    sleep(SOON);
    let reset = tcp::capture(two.stream.as_fd())?;
    ensure!(matches!(&reset.state, TcpState::Ended { error: true, .. }), "{:?}", reset.state);
    for record in [cut_off, reset] {
        let (rebuilt, fd) = moved.rebuild(4, &record, None)?;
        rebuilt.connect()?;
        two.stream = fd.into();
        two.read.1 = 0;
        two.read_to(1234)?;
        ensure!(two.read(SOON).is_err(), "no error after the data");
    }
    Ok(())
}

#[test]
fn what_cannot_be_saved_is_refused() -> Result<()> {
    use nix::sys::socket::{MsgFlags, send};
    use std::os::fd::AsRawFd;
    let moved = Moved::new()?;
    let (one, two) = moved.connection(moved.node(2).ip4.into())?;
    (&one).write_all(b"before")?;
    send(one.as_raw_fd(), b"!", MsgFlags::MSG_OOB)?;
    sleep(SOON);
    ensure!(matches!(tcp::capture(two.as_fd()), Err(CaptureError::Urgent)));

    // SAFETY: plain numbers; a non-negative result is a new descriptor that nobody else owns.
    let multipath = unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_MPTCP);
        (fd >= 0).then(|| OwnedFd::from_raw_fd(fd))
    };
    if let Some(multipath) = multipath {
        ensure!(matches!(tcp::capture(multipath.as_fd()), Err(CaptureError::Multipath)));
    }
    Ok(())
}

#[test]
fn unconnected_sockets_come_back() -> Result<()> {
    let moved = Moved::new()?;
    let listener = moved.node(1).in_network(|| TcpListener::bind((moved.node(1).ip4, 0)))??;
    let mut record = tcp::capture(listener.as_fd())?;
    record.state = TcpState::Unconnected;
    let (rebuilt, fd) = moved.rebuild(3, &record, None)?;
    rebuilt.connect()?;
    let again = tcp::capture(fd.as_fd())?;
    assert_eq!(again.state, TcpState::Unconnected);
    assert_eq!(again.local.map(|local| local.ip), Some(moved.node(3).ip4.into()));
    Ok(())
}

/// Not a test of its own: the process that [`a_killed_capture_leaves_no_socket_in_repair_mode`] kills.
#[test]
fn capturer() -> Result<()> {
    let Ok(fds) = std::env::var("CKPT_TEST_CAPTURE") else { return Ok(()) };
    let parent = ckpt_cli::sys::pidfd::open(nix::unistd::getppid().as_raw())?;
    let take =
        |fd: &str| -> Result<OwnedFd> { Ok(ckpt_cli::sys::pidfd::getfd(parent.as_fd(), fd.parse()?)?) };
    let sockets: Vec<OwnedFd> = fds.split(',').map(take).collect::<Result<_>>()?;
    let guard = tcp::Guard::start()?;
    for socket in &sockets {
        guard.watch(socket.as_fd())?;
        tcp::silence(socket.as_fd())?;
    }
    writeln!(std::io::stdout(), "\nin repair mode")?;
    sleep(Duration::from_secs(60));
    guard.dismiss()
}

#[test]
fn a_killed_capture_leaves_no_socket_in_repair_mode() -> Result<()> {
    use std::io::{BufRead, BufReader};
    use std::os::fd::AsRawFd;
    let moved = Moved::new()?;
    let (one, two) = moved.connection(moved.node(2).ip4.into())?;
    let reuse =
        |stream: &TcpStream| nix::sys::socket::getsockopt(stream, nix::sys::socket::sockopt::ReuseAddr);
    assert_eq!((reuse(&one)?, reuse(&two)?), (false, true));
    let mut capturer = std::process::Command::new(std::env::current_exe()?)
        .args(["--exact", "capturer", "--nocapture"])
        .env("CKPT_TEST_CAPTURE", format!("{},{}", one.as_raw_fd(), two.as_raw_fd()))
        .stdout(std::process::Stdio::piped())
        .spawn()?;
    let lines = BufReader::new(capturer.stdout.take().context("output")?).lines();
    let ready = lines.map_while(Result::ok).any(|line| line == "in repair mode");
    let (mut one, mut two) = ends(one, two, 3);
    let broken = one.write(10);
    capturer.kill()?;
    capturer.wait()?;
    ensure!(ready && broken.is_err(), "not in repair mode");
    let deadline = Instant::now() + Duration::from_secs(20);
    while one.write(10).is_err() || two.write(10).is_err() {
        ensure!(Instant::now() < deadline, "still in repair mode");
        sleep(Duration::from_millis(1));
    }
    check_both(&mut one, &mut two)?;
    assert_eq!((reuse(&one.stream)?, reuse(&two.stream)?), (false, true));

    // Dismissed, the guard changes nothing.
    let start = Instant::now();
    let guard = tcp::Guard::start()?;
    for _ in 0..500 {
        guard.watch(one.stream.as_fd())?;
        guard.watch(two.stream.as_fd())?;
    }
    guard.dismiss()?;
    println!("a guard came, saw 1000 sockets and went in {:?}", start.elapsed());
    check_both(&mut one, &mut two)
}
