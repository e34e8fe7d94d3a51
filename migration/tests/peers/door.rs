//! Who is let in, and in which role.

use std::sync::atomic::Ordering;
use std::time::Duration;

use migration::guest::BLOCK_BYTES;
use migration::transport::TransportError;
use migration::transport::channels::Channel;
use migration::transport::stream::TlsStream;
use migration::wire::handshake::{Hello, MAGIC, Role, proof};
use migration::wire::message::Message;

use crate::party::Victim;

fn waiting() -> Victim {
    Victim::new(&[4 * BLOCK_BYTES], |_, pair| pair.destination_options.deadline = Duration::from_secs(1))
}

fn hello(victim: &Victim, stream: &TlsStream, role: Role) -> Hello {
    let options = &victim.pair.source_options;
    let session = stream.session_key();
    Hello {
        magic: MAGIC,
        versions: (1, 1),
        features: Vec::new(),
        id: options.id.clone(),
        role,
        proof: *proof(&options.token, &session, &options.id, role).as_bytes(),
        extension: Vec::new(),
    }
}

/// Sends a hello; returns the refusal.
fn refused(victim: &Victim, change: impl FnOnce(&mut Hello)) -> String {
    let stream = victim.stream();
    let mut hello = hello(victim, &stream, Role::Control);
    change(&mut hello);
    let mut channel = Channel::new(stream, Role::Control);
    channel.send(&Message::Hello(hello)).expect("sent");
    channel.receive("an answer").expect_err("a refusal").to_string()
}

#[test]
fn hellos_that_are_refused_and_the_wait_goes_on() {
    let victim = waiting();
    let wrong_token = refused(&victim, |hello| hello.proof[31] ^= 1);
    assert!(wrong_token.contains("one-time token"), "{wrong_token}");
    // A proof that was good in another session, as somebody would replay it.
    let replayed = hello(&victim, &victim.stream(), Role::Control).proof;
    let replay = refused(&victim, |hello| hello.proof = replayed);
    assert!(replay.contains("another session"), "{replay}");
    let other_id = refused(&victim, |hello| hello.id = "x\n\u{1b}[31m".repeat(20));
    assert!(other_id.contains("another migration") && !other_id.contains('\u{1b}'), "{other_id}");
    let version = refused(&victim, |hello| hello.versions = (7, 9));
    assert!(version.contains("versions 7 to 9") && version.contains("1 to 1"), "{version}");
    let magic = refused(&victim, |hello| hello.magic = *b"SOMEBODY");
    assert!(magic.contains("does not begin as a migration does"), "{magic}");
    // A proof for one role is not good for another.
    let role = refused(&victim, |hello| hello.role = Role::Disk);
    assert!(role.contains("one-time token"), "{role}");
    // Eight kilobytes are enough for a hello.
    let long = refused(&victim, |hello| hello.extension = vec![0; 9000]);
    assert!(long.contains("at most 8192"), "{long}");
    // After all of these the right one is welcome.
    let (control, _, _) = victim.ready();
    drop(control);
    victim.gave_up("closed the connection");
}

#[test]
fn garbage_after_tls() {
    let victim = waiting();
    let mut stream = victim.stream();
    stream.queue(&[0xa5; 64]).expect("queued");
    stream.flush().expect("sent");
    let mut channel = Channel::new(stream, Role::Control);
    let answer = channel.receive("an answer").expect_err("a refusal").to_string();
    assert!(answer.contains("unknown kind 165"), "{answer}");
    victim.gave_up("no source proved itself");
}

#[test]
fn duplicate_and_unknown_roles_are_refused_and_the_first_stays() {
    let victim = waiting();
    let mut control = victim.open(Role::Control).expect("welcome");
    control.send(&Message::Layout { layout: victim.layout.clone(), streams: 1 }).expect("sent");
    let _memory = victim.open(Role::Memory(0)).expect("welcome");
    for (role, expected) in [
        (Role::Memory(0), "a memory 0 channel already"),
        (Role::Memory(1), "no memory 1 channel was announced"),
        (Role::Control, "no control channel was announced"),
    ] {
        let error = victim.open(role).err().expect("a refusal").to_string();
        assert!(error.contains(expected), "{error}");
    }
    let _disk = victim.open(Role::Disk).expect("welcome");
    assert_eq!(control.receive("ready").expect("an answer"), Message::Ready);
    drop(control);
    victim.gave_up("closed the connection");
}

#[test]
fn too_few_channels() {
    let victim = waiting();
    let mut control = victim.open(Role::Control).expect("welcome");
    control.send(&Message::Layout { layout: victim.layout.clone(), streams: 4 }).expect("sent");
    let _memory = victim.open(Role::Memory(2)).expect("welcome");
    let told = control.receive("ready").expect_err("a refusal").to_string();
    assert!(told.contains("only 1 of 5 data channels"), "{told}");
    victim.gave_up("only 1 of 5 data channels");
}

#[test]
fn a_layout_that_no_machine_can_have() {
    let victim = waiting();
    let mut control = victim.open(Role::Control).expect("welcome");
    let mut layout = victim.layout.clone();
    layout.memory[0].bytes = 1 << 62;
    control.send(&Message::Layout { layout, streams: 1 }).expect("sent");
    let told = control.receive("ready").expect_err("a refusal").to_string();
    assert!(told.contains("malformed layout"), "{told}");
    assert_eq!(victim.machine.faults.calls("prepare"), 0);
    victim.gave_up("malformed layout");
}

/// Hosts are updated one at a time: a source of another release is welcome as long as there is a version that both speak, and
/// what this one does not know of is left out.
#[test]
fn other_releases_agree_on_what_both_know() {
    for versions in [(1, 1), (0, 1), (1, 7), (0, u16::MAX)] {
        let victim = waiting();
        let stream = victim.stream();
        let features = ["verify", "time-travel", "", "postcopy"].map(str::to_owned).to_vec();
        let hello = Hello { versions, features, extension: vec![1; 500], ..hello(&victim, &stream, Role::Control) };
        let mut channel = Channel::new(stream, Role::Control);
        channel.send(&Message::Hello(hello)).expect("sent");
        match channel.receive("an answer").expect("welcome") {
            // This destination has no post-copy.
            Message::Welcome(welcome) => {
                assert_eq!((welcome.version, welcome.features), (1, vec!["verify".to_owned()]));
            }
            other => panic!("{}", other.name()),
        }
        drop(channel);
        victim.gave_up("closed the connection");
    }
    for versions in [(2, 3), (0, 0), (5, 1)] {
        let victim = waiting();
        let error = refused(&victim, |hello| hello.versions = versions);
        assert!(error.contains("bring both hosts to releases that are at most one apart"), "{error}");
        victim.gave_up("no source proved itself");
    }
}

/// The door stays open while post-copy is possible: a source that has proved itself, and floods it, is told off, costs no more
/// than a few sessions, and does not keep the migration itself from its end.
#[test]
fn a_flood_of_proved_connections_is_bounded() {
    let victim = Victim::new(&[4 * BLOCK_BYTES], |machine, _| machine.offers_postcopy.store(true, Ordering::SeqCst));
    let (control, _memory, _disk) = victim.ready();
    let mut waiting = Vec::new();
    let refusal = (0..64).find_map(|_| {
        let stream = victim.stream();
        let hello = hello(&victim, &stream, Role::Fault);
        let mut channel = Channel::new(stream, Role::Fault);
        channel.set_patience(Duration::from_millis(300));
        channel.send(&Message::Hello(hello)).expect("sent");
        // Whoever waits for his turn hears nothing.
        let refusal = match channel.receive("an answer") {
            Err(TransportError::Aborted { reason }) => Some(reason),
            Err(TransportError::Silent { .. }) => None,
            other => panic!("{other:?}"),
        };
        waiting.push(channel);
        refusal
    });
    let refusal = refusal.expect("a flood that is bounded");
    assert!(refusal.contains("wait for their turn already"), "{refusal}");
    assert!(waiting.len() <= 16, "{} connections were let in", waiting.len());
    // A role that no migration has is refused at once.
    let error = victim.open(Role::Memory(16)).err().expect("a refusal").to_string();
    assert!(error.contains("there is no memory 16 channel"), "{error}");
    drop(control);
    victim.gave_up("closed the connection");
}
