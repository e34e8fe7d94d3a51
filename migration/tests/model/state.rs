//! What the model consists of: both VMMs, both daemons, and what is on its way between them.

use migration::control::Phase;

/// Messages of the control channel that decide something, by the names of `wire::message::Message`. Pages, blocks, digests and
/// pings change nothing about who may run the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Message {
    Layout,
    Ready,
    PostcopyPrepare,
    PostcopyReady,
    State,
    Prepared,
    Commit,
    Resumed,
    Abort,
}

/// Messages on their way in one direction, in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Queue([Option<Message>; 3]);

impl Queue {
    pub fn first(&self) -> Option<Message> {
        self.0[0]
    }

    pub fn is_empty(&self) -> bool {
        self.0[0].is_none()
    }

    pub fn push(&mut self, message: Message) {
        let free = self.0.iter_mut().find(|slot| slot.is_none()).expect("no party sends so much ahead");
        *free = Some(message);
    }

    pub fn pop(&mut self) {
        self.0.rotate_left(1);
        self.0[2] = None;
    }

    /// The newest one is lost; what was sent before it may still arrive.
    pub fn drop_last(&mut self) {
        if let Some(slot) = self.0.iter_mut().rev().find(|slot| slot.is_some()) {
            *slot = None;
        }
    }
}

/// The control connection. Each end may be closed by its owner; a cut loses a suffix of what is on its way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Link {
    pub to_destination: Queue,
    pub to_source: Queue,
    pub source_open: bool,
    pub destination_open: bool,
    pub cut: bool,
}

impl Link {
    pub fn say_to_destination(&mut self, message: Message) {
        if self.source_open && self.destination_open && !self.cut {
            self.to_destination.push(message);
        }
    }

    pub fn say_to_source(&mut self, message: Message) {
        if self.source_open && self.destination_open && !self.cut {
            self.to_source.push(message);
        }
    }

    pub fn close_source(&mut self) {
        self.source_open = false;
        self.to_source = Queue::default();
    }

    pub fn close_destination(&mut self) {
        self.destination_open = false;
        self.to_destination = Queue::default();
    }

    /// The source has read everything and finds the connection gone.
    pub fn lost_to_source(&self) -> bool {
        self.source_open && self.to_source.is_empty() && (self.cut || !self.destination_open)
    }

    pub fn lost_to_destination(&self) -> bool {
        self.destination_open && self.to_destination.is_empty() && (self.cut || !self.source_open)
    }
}

/// The connections of post-copy: fault channel and push channels together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Session {
    #[default]
    None,
    Up,
    Lost,
}

/// `report::Outcome`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    Completed,
    /// Or cancelled: it runs here as before.
    Failed,
    InDoubt,
}

/// The machine's process at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    pub alive: bool,
    /// None before it was told to send.
    pub phase: Option<Phase>,
    /// Post-copy was asked for, and is attached.
    pub postcopy: (bool, bool),
    /// `Control`: exclude each other.
    pub cancelled: bool,
    pub committed: bool,
    pub paused: bool,
    pub fenced: bool,
    pub outcome: Option<Outcome>,
    /// The daemon has ended its doubt.
    pub settled: bool,
    /// A new process, started from the disk by an operator.
    pub cold: bool,
}

impl Source {
    pub fn runs(&self) -> bool {
        self.cold || (self.alive && !self.paused && !self.fenced)
    }
}

/// How the destination's engine ended: `Received`, or `DestinationError`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arrival {
    Received,
    NotCommitted,
    Lost,
}

/// The process at the destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Destination {
    /// It was started.
    pub born: bool,
    pub alive: bool,
    pub phase: Option<Phase>,
    pub postcopy: bool,
    /// It has said Prepared.
    pub prepared: bool,
    /// Commit was taken from the channel.
    pub commit_arrived: bool,
    pub cancelled: bool,
    pub committed: bool,
    pub runs: bool,
    /// A session failed before Commit.
    pub fate_failed: bool,
    /// Nothing is missing any more.
    pub complete: bool,
    pub arrival: Option<Arrival>,
    /// The file that says, also after a crash, that the machine has run here.
    pub mark: bool,
}

impl Destination {
    /// Whether a source can connect: its listener lives in the process.
    pub fn listens(&self) -> bool {
        self.alive && self.arrival.is_none() && self.phase != Some(Phase::Verify)
    }
}

/// `MigrationStage`, as stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    Reserving,
    Transferring,
    Settling,
    Verifying,
    Completed,
    /// Or cancelled.
    Failed,
    /// It ran at the destination by post-copy, and a part of it will never arrive.
    Lost,
}

impl Stage {
    pub fn ended(self) -> bool {
        matches!(self, Stage::Completed | Stage::Failed | Stage::Lost)
    }
}

/// `MachineStatus`, as stored at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    Migrating,
    InDoubt,
    Running,
    Stopped,
    Deleting,
    Gone,
}

/// `Settlement`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Settlement {
    Runs,
    Never,
    Lost,
}

/// What the source's daemon is about to do; lost with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Task {
    Reserve,
    Send,
    Follow,
    GiveBack,
    Settle,
    Tell(Settlement),
    Leave,
    /// `stay` has stored the machine's status, and not yet the migration's stage.
    Stay,
    Idle,
}

/// `hostd` at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SourceDaemon {
    pub alive: bool,
    pub stage: Stage,
    pub status: Status,
    pub task: Task,
}

/// `hostd` at the destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DestinationDaemon {
    pub alive: bool,
    /// The stored record of this migration.
    pub stage: Option<Stage>,
    /// The source has asked, so the VMM is to be cancelled; lost with it.
    pub asked: bool,
}

/// A question between the daemons. Requests, answers and connections get lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Call<T> {
    #[default]
    None,
    Request,
    /// The destination's daemon waits for its own VMM to decide.
    Waiting,
    Reply(T),
}

/// What has happened; no party can see it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct History {
    pub commit_sent: bool,
    /// The destination, or its daemon, has said that it never ran it.
    pub never_said: bool,
    /// The guest has run at the destination.
    pub ran_there: bool,
    pub source_crashed: bool,
    /// The machine was lost as documented: the destination's process died with it or gave up for lack of pages, or the operator
    /// abandoned a post-copy.
    pub lost_there: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct State {
    pub link: Link,
    pub session: Session,
    pub source: Source,
    pub destination: Destination,
    pub here: SourceDaemon,
    pub there: DestinationDaemon,
    /// Answered with whether there is a place.
    pub reserve: Call<bool>,
    pub settle: Call<Settlement>,
    pub history: History,
}

impl State {
    /// The machine runs at the source, and its migration has been queued.
    pub fn first() -> Self {
        Self {
            link: Link::default(),
            session: Session::None,
            source: Source {
                alive: true,
                phase: None,
                postcopy: (false, false),
                cancelled: false,
                committed: false,
                paused: false,
                fenced: false,
                outcome: None,
                settled: false,
                cold: false,
            },
            destination: Destination::default(),
            here: SourceDaemon { alive: true, stage: Stage::Reserving, status: Status::Migrating, task: Task::Reserve },
            there: DestinationDaemon { alive: true, ..DestinationDaemon::default() },
            reserve: Call::None,
            settle: Call::None,
            history: History::default(),
        }
    }
}
