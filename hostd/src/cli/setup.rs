//! `headroom init` and `headroom pki`.

use std::fs::OpenOptions;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::Failure;
use super::output::Output;
use crate::config::{CapacityConfig, HostConfig, PeerConfig, PlannerConfig, TlsPaths};
use crate::security::pki;

/// Port of `listen` unless said otherwise.
const PORT: u16 = 7420;

#[derive(Debug, Subcommand)]
pub(super) enum Pki {
    /// Make an authority: ca.pem, which every host gets, and ca.key, which stays where you make certificates.
    Authority {
        /// Folder; made if missing.
        #[arg(long, default_value = "/etc/headroom/pki")]
        folder: PathBuf,
        /// Name in the authority's certificate.
        #[arg(long, default_value = "Headroom authority")]
        name: String,
    },
    /// Make a key and a certificate for a host: HOST.key and HOST.pem.
    Issue {
        /// Host, as in its configuration.
        host: String,
        /// Folder with the authority.
        #[arg(long, default_value = "/etc/headroom/pki")]
        folder: PathBuf,
    },
}

/// What the host is called and where it is.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  headroom init a1 --pool a --address 10.1.0.1 --peer a2=a=10.1.0.2 --peer b1=b=10.1.0.3 --bridge br0
  headroom init b1 --pool b --address 10.1.0.3 --peer a1=a=10.1.0.1 --pki /media/stick/pki

Makes FOLDER/hostd.json, and FOLDER/pki with an authority (unless there is one) and this host's certificate.")]
pub(super) struct Init {
    /// Name of the host.
    host: String,
    /// Its pool.
    #[arg(long)]
    pool: String,
    /// Address at which its peers reach it.
    #[arg(long)]
    address: IpAddr,
    /// Another host: NAME=POOL=ADDRESS[:PORT]. Repeatable.
    #[arg(long = "peer", value_name = "NAME=POOL=ADDRESS", value_parser = parse_peer)]
    peers: Vec<PeerConfig>,
    /// Bridge that machines' network cards are attached to.
    #[arg(long)]
    bridge: Option<String>,
    /// Where the configuration goes.
    #[arg(long, default_value = "/etc/headroom")]
    folder: PathBuf,
    /// Folder of the authority; FOLDER/pki unless said otherwise.
    #[arg(long)]
    pki: Option<PathBuf>,
}

fn parse_peer(text: &str) -> Result<PeerConfig, String> {
    let mut parts = text.splitn(3, '=');
    let (Some(host), Some(pool), Some(address)) = (parts.next(), parts.next(), parts.next()) else {
        return Err("use NAME=POOL=ADDRESS, for example b1=b=10.1.0.2".to_owned());
    };
    let parsed = address.parse::<SocketAddr>();
    let address = parsed.or_else(|_| address.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, PORT)));
    let address = address.map_err(|_| format!("`{}` is not an address", text.rsplit('=').next().unwrap_or(text)))?;
    Ok(PeerConfig { host: host.to_owned(), pool: pool.to_owned(), address })
}

pub(super) fn pki(output: &Output, command: Pki) -> Result<(), Failure> {
    match command {
        Pki::Authority { folder, name } => {
            pki::create_authority(&folder, &name).map_err(|error| Failure::other(&error))?;
            let made = serde_json::json!({"ca": folder.join("ca.pem"), "key": folder.join("ca.key")});
            output.print(&made, |_| {
                format!("made {} and ca.key; keep ca.key off the hosts if you can", folder.join("ca.pem").display())
            })?;
        }
        Pki::Issue { host, folder } => {
            let paths = pki::issue(&folder, &host).map_err(|error| Failure::other(&error))?;
            output
                .print(&paths, |paths| format!("made {} and {}", paths.certificate.display(), paths.key.display()))?;
        }
    }
    Ok(())
}

pub(super) fn init(output: &Output, arguments: Init) -> Result<(), Failure> {
    let folder = std::path::absolute(&arguments.folder)?;
    let pki_folder = arguments.pki.map_or_else(|| Ok(folder.join("pki")), std::path::absolute)?;
    let mut config = HostConfig {
        host: arguments.host,
        pool: arguments.pool,
        run_dir: "/run/headroom".into(),
        state_dir: "/var/lib/headroom".into(),
        shared_dirs: Vec::new(),
        image_dirs: Vec::new(),
        socket: "/run/headroom/hostd.sock".into(),
        socket_group: None,
        listen: SocketAddr::new(arguments.address, PORT),
        migration_address: arguments.address,
        tls: TlsPaths { ca: pki_folder.join("ca.pem"), certificate: PathBuf::new(), key: PathBuf::new() },
        vmm: None,
        capacity: CapacityConfig::default(),
        peers: arguments.peers,
        bridge: arguments.bridge,
        sample_interval_ms: 1000,
        planner: PlannerConfig::default(),
        concurrent_migrations: 2,
        migration: Default::default(),
        access: Vec::new(),
    };
    config.tls.certificate = pki_folder.join(format!("{}.pem", config.host));
    config.tls.key = pki_folder.join(format!("{}.key", config.host));
    let mistakes: Vec<String> = config.mistakes().iter().map(ToString::to_string).collect();
    if !mistakes.is_empty() {
        return Err(Failure::Other(mistakes.join("; ")));
    }
    let path = folder.join("hostd.json");
    if path.exists() {
        return Err(Failure::Other(format!("{} exists already: change that, or remove it first", path.display())));
    }
    if !pki_folder.join("ca.pem").exists() {
        pki::create_authority(&pki_folder, "Headroom authority").map_err(|error| Failure::other(&error))?;
    }
    if !config.tls.certificate.exists() {
        pki::issue(&pki_folder, &config.host).map_err(|error| Failure::other(&error))?;
    }
    write_config(&path, &config)?;
    output.print(&config, |config| {
        format!(
            "made {}\nstart it:      hostd --config {}\nother hosts:   headroom init NAME --pool POOL --address ADDRESS --peer {}={}={} --pki {}",
            path.display(),
            path.display(),
            config.host,
            config.pool,
            config.listen,
            pki_folder.display()
        )
    })?;
    Ok(())
}

fn write_config(path: &Path, config: &HostConfig) -> Result<(), Failure> {
    let write = || -> std::io::Result<()> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o640).open(path)?;
        file.write_all(&serde_json::to_vec_pretty(config)?)?;
        file.write_all(b"\n")
    };
    write().map_err(|error| Failure::Other(format!("cannot write {}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_name_pool_and_address() {
        let peer = parse_peer("b1=b=10.1.0.2").unwrap();
        assert_eq!((peer.host.as_str(), peer.pool.as_str(), peer.address.port()), ("b1", "b", PORT));
        assert_eq!(parse_peer("b1=b=[::1]:99").unwrap().address.port(), 99);
        assert!(parse_peer("b1=10.1.0.2").is_err() && parse_peer("b1=b=x").is_err());
    }

    #[test]
    fn what_init_makes_is_a_usable_configuration() {
        let folder = tempfile::tempdir().unwrap();
        let make = |host: &str, peer: &str| Init {
            host: host.into(),
            pool: "a".into(),
            address: [127, 0, 0, 1].into(),
            peers: vec![parse_peer(peer).unwrap()],
            bridge: None,
            folder: folder.path().join(host),
            pki: Some(folder.path().join("pki")),
        };
        init(&Output::new(true), make("a1", "b1=b=127.0.0.2")).unwrap();
        init(&Output::new(true), make("b1", "a1=a=127.0.0.9")).unwrap();
        let config = HostConfig::load(&folder.path().join("a1/hostd.json")).unwrap();
        crate::security::tls::Identity::load("a1", &config.tls).unwrap();
        assert!(init(&Output::new(true), make("a1", "b1=b=127.0.0.2")).is_err(), "nothing is overwritten");
    }
}
