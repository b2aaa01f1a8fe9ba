//! The program behind the test cluster: its commands for people (`cargo xtask cluster` passes
//! them on), and the processes that a cluster is made of.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command for people, not a library")]

use anyhow::{Context, Result};
use ckpt_tests::cluster::{Cluster, keeper, node, reach};
use clap::{Parser, Subcommand};
use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(bin_name = "cargo xtask cluster", about = "Test nodes on one machine")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Start a cluster; it stays up until `down`
    Up {
        /// Name of the cluster
        name: String,
        /// Number of nodes
        #[arg(long, default_value_t = 2)]
        nodes: usize,
    },
    /// Run a command in a node
    Exec {
        /// Name of the cluster
        name: String,
        /// Name of the node
        node: String,
        /// The command
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<OsString>,
    },
    /// End a cluster and remove all of it
    Down {
        /// Name of the cluster
        name: String,
    },
    /// Keep a cluster as long as standard input is open
    #[command(hide = true)]
    Keep {
        dir: PathBuf,
        nodes: usize,
        #[arg(long)]
        detached: bool,
    },
    /// Make the namespaces of a node
    #[command(hide = true)]
    Door { dir: PathBuf, name: String, keeper: i32 },
    /// PID 1 of a node
    #[command(hide = true)]
    Init { dir: PathBuf, name: String },
    /// Run a command in the namespaces of a node
    #[command(hide = true)]
    Enter {
        init: i32,
        #[arg(last = true)]
        command: Vec<OsString>,
    },
    /// Connect standard input and output with an address in the cluster
    #[command(hide = true)]
    Relay { keeper: i32, address: IpAddr, port: u16 },
    /// Own a cluster, tell its folder, and wait to be killed
    #[command(hide = true)]
    Own {
        nodes: usize,
        /// End when standard input is closed, too
        #[arg(long)]
        attached: bool,
    },
}

fn main() -> ExitCode {
    run(Arguments::parse().task).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(task: Task) -> Result<ExitCode> {
    match task {
        Task::Up { name, nodes } => {
            let cluster = Cluster::up(&name, nodes)?;
            for node in cluster.nodes() {
                println!("{}  {}  {}", node.name, node.ip4, node.ip6);
            }
            println!("ssh -F {} node1", cluster.ssh_config().display());
            println!("cargo xtask cluster exec {name} node1 COMMAND");
        }
        Task::Exec { name, node, command } => {
            let cluster = Cluster::open(&name)?;
            let node = cluster.nodes().iter().find(|other| other.name == node);
            return reach::enter(node.context("the cluster has no such node")?.init, &command);
        }
        Task::Down { name } => Cluster::down(&name)?,
        Task::Keep { dir, nodes, detached } => keeper::keep(&dir, nodes, detached)?,
        Task::Door { dir, name, keeper } => node::door(&dir, &name, keeper)?,
        Task::Init { dir, name } => node::init(&dir, &name)?,
        Task::Enter { init, command } => return reach::enter(init, &command),
        Task::Relay { keeper, address, port } => reach::relay(keeper, address, port)?,
        Task::Own { nodes, attached } => {
            let cluster = Cluster::start(nodes)?;
            println!("{}", cluster.dir().display());
            if attached {
                std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink())?;
                return Ok(ExitCode::SUCCESS);
            }
            loop {
                std::thread::park();
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
