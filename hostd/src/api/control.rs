//! The control API, for operators.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use axum::{Extension, Json};

use vmm::api::{BalloonInfo, BalloonTarget};

use super::body::{Answer, Body, Limit, Risk, Segment};
use super::problem::Failure;
use super::types::{
    AuditRecord, CreateMachine, DetachDisk, DirtyRate, DirtyRateRequest, Disk, DiskSize, Event, Machine,
    MachineForecast, NewDisk, NewEvent, Plan, PoolCapacity, PoolView, StopMachine,
};
use super::{Route, Shared, host, migration, route};
use crate::executor::ExecutorError;
use crate::machine::entry::Entry;
use crate::machine::registry::call;
use crate::security::access::{Action, Actor, Object};

type From = Extension<Actor>;

/// All routes. Several methods of one path are several routes here.
pub fn routes() -> Vec<Route> {
    let own = vec![
        route("GET", "/v1/pools", "All pools as seen from this host", None, Some("[PoolView]"), 200, get(pools)),
        route(
            "GET",
            "/v1/forecasts",
            "Forecasts of the machines of this host's pool",
            None,
            Some("[MachineForecast]"),
            200,
            get(forecasts),
        ),
        route(
            "GET",
            "/v1/capacity",
            "Hosts that each pool needs over the next day (?risk=R, the accepted probability that it runs out)",
            None,
            Some("[PoolCapacity]"),
            200,
            get(capacity),
        ),
        route("GET", "/v1/events", "Scheduled events", None, Some("[Event]"), 200, get(events)),
        route("POST", "/v1/events", "Declare an event", Some("NewEvent"), Some("Event"), 201, post(add_event)),
        route("DELETE", "/v1/events/{id}", "Remove an event", None, None, 204, delete(remove_event)),
        route("GET", "/v1/plans", "Decisions of the planner, the newest first", None, Some("[Plan]"), 200, get(plans)),
        route(
            "GET",
            "/v1/audit",
            "The last records of the audit log (?limit=N), the oldest first",
            None,
            Some("[AuditRecord]"),
            200,
            get(audit),
        ),
    ];
    host::routes().into_iter().chain(machine_routes()).chain(own).chain(migration::routes()).collect()
}

fn machine_routes() -> Vec<Route> {
    vec![
        route("GET", "/v1/machines", "Machines of this host", None, Some("[Machine]"), 200, get(machines)),
        route(
            "POST",
            "/v1/machines",
            "Create and start a machine",
            Some("CreateMachine"),
            Some("Machine"),
            201,
            post(create_machine),
        ),
        route("GET", "/v1/machines/{name}", "One machine", None, Some("Machine"), 200, get(machine)),
        route("DELETE", "/v1/machines/{name}", "Stop and delete a machine", None, None, 204, delete(delete_machine)),
        route(
            "POST",
            "/v1/machines/{name}/start",
            "Start a stopped machine again",
            None,
            Some("Machine"),
            200,
            post(start_machine),
        ),
        route(
            "POST",
            "/v1/machines/{name}/stop",
            "Have the guest of a machine shut down, or stop it by force; it can be started again. Refused while it moves",
            Some("StopMachine"),
            Some("Machine"),
            200,
            post(stop_machine),
        ),
        route(
            "GET",
            "/v1/machines/{name}/balloon",
            "What a machine has given back through its balloon",
            None,
            Some("BalloonInfo"),
            200,
            get(balloon),
        ),
        route(
            "PUT",
            "/v1/machines/{name}/balloon",
            "Ask a machine to give memory back",
            Some("BalloonTarget"),
            Some("BalloonInfo"),
            200,
            put(inflate),
        ),
        route(
            "POST",
            "/v1/machines/{name}/dirty-rate",
            "Estimate how fast a machine dirties its memory; no migration is needed, and none is disturbed",
            Some("DirtyRateRequest"),
            Some("DirtyRate"),
            200,
            post(dirty_rate),
        ),
        route(
            "PUT",
            "/v1/machines/{name}/disk",
            "Make a disk of a machine larger, while it runs or is stopped; refused while it moves",
            Some("DiskSize"),
            Some("Machine"),
            200,
            put(resize_disk),
        ),
        route(
            "POST",
            "/v1/machines/{name}/attach",
            "Give a stopped machine another disk",
            Some("NewDisk"),
            Some("Machine"),
            200,
            post(attach_disk),
        ),
        route(
            "POST",
            "/v1/machines/{name}/detach",
            "Take a disk from a stopped machine; its image stays",
            Some("DetachDisk"),
            Some("Disk"),
            200,
            post(detach_disk),
        ),
    ]
}

async fn pools(State(daemon): State<Shared>, Extension(actor): From) -> Answer<Vec<PoolView>> {
    daemon.permit(&actor, Action::View, "pools", Object::default())?;
    Ok(Json(daemon.pool_views()))
}

async fn forecasts(State(daemon): State<Shared>, Extension(actor): From) -> Answer<Vec<MachineForecast>> {
    daemon.permit(&actor, Action::View, "forecasts", Object::default())?;
    Ok(Json(daemon.planner().machine_forecasts()))
}

async fn capacity(State(daemon): State<Shared>, Extension(actor): From, Risk(risk): Risk) -> Answer<Vec<PoolCapacity>> {
    daemon.permit(&actor, Action::View, "capacity", Object::default())?;
    Ok(Json(daemon.planner().capacities(risk)))
}

async fn machines(State(daemon): State<Shared>, Extension(actor): From) -> Answer<Vec<Machine>> {
    daemon.permit(&actor, Action::View, "machines", Object::default())?;
    Ok(Json(daemon.machines.views()))
}

async fn create_machine(
    State(daemon): State<Shared>,
    Extension(actor): From,
    Body(new): Body<CreateMachine>,
) -> Result<Response, Failure> {
    daemon.permit(&actor, Action::Create, &object("machine", &new.name), about(&new.name))?;
    if daemon.gate.closed() {
        return Err(ExecutorError::Draining(daemon.config.host.clone()).into());
    }
    if let Some(host) = daemon.host_of(&new.name) {
        let detail = format!("a machine `{}` is on host `{host}` already: choose another name", new.name);
        return Err(Failure::new(409, "machine-exists", detail));
    }
    let name = new.name.clone();
    // In a task of its own: a client that hangs up does not leave half a machine.
    let shared = Shared::clone(&daemon);
    let made = spawned(async move { shared.machines.create(&new).await }).await?;
    let detail = made
        .as_ref()
        .map_or_else(|error| format!("failed: {}", crate::machine::chain(error)), |_| "running".to_owned());
    daemon.audit.noted("created", &object("machine", &name), &detail);
    Ok((StatusCode::CREATED, Json(made?)).into_response())
}

async fn machine(State(daemon): State<Shared>, Extension(actor): From, Segment(name): Segment) -> Answer<Machine> {
    daemon.permit(&actor, Action::View, &object("machine", &name), about(&name))?;
    Ok(Json(daemon.machines.view(&name)?))
}

async fn start_machine(
    State(daemon): State<Shared>,
    Extension(actor): From,
    Segment(name): Segment,
) -> Answer<Machine> {
    daemon.permit(&actor, Action::Create, &object("machine", &name), about(&name))?;
    let shared = Shared::clone(&daemon);
    Ok(Json(spawned(async move { shared.machines.start(&name).await }).await??))
}

async fn stop_machine(
    State(daemon): State<Shared>,
    Extension(actor): From,
    Segment(name): Segment,
    Body(how): Body<StopMachine>,
) -> Answer<Machine> {
    let object = object("machine", &name);
    daemon.permit(&actor, Action::Adjust, &object, about(&name))?;
    let shared = Shared::clone(&daemon);
    let machine = spawned(async move { shared.machines.stop(&name, &how).await }).await??;
    daemon.audit.noted("stopped", &object, machine.reason.as_deref().unwrap_or_default());
    Ok(Json(machine))
}

async fn delete_machine(
    State(daemon): State<Shared>,
    Extension(actor): From,
    Segment(name): Segment,
) -> Result<StatusCode, Failure> {
    daemon.permit(&actor, Action::Delete, &object("machine", &name), about(&name))?;
    let shared = Shared::clone(&daemon);
    spawned(async move { shared.machines.delete(&name).await }).await??;
    Ok(StatusCode::NO_CONTENT)
}

async fn balloon(State(daemon): State<Shared>, Extension(actor): From, Segment(name): Segment) -> Answer<BalloonInfo> {
    daemon.permit(&actor, Action::View, &object("machine", &name), about(&name))?;
    let entry = with_balloon(&daemon, &name)?;
    Ok(Json(call(&entry, |client| client.balloon()).await?))
}

fn with_balloon(daemon: &Shared, name: &str) -> Result<Arc<Entry>, Failure> {
    let entry = daemon.machines.get(name)?;
    if entry.record().balloon {
        return Ok(entry);
    }
    let detail = format!("the machine `{name}` has no balloon: that is chosen when it is created (`--balloon`)");
    Err(Failure::new(409, "no-balloon", detail))
}

async fn inflate(
    State(daemon): State<Shared>,
    Extension(actor): From,
    Segment(name): Segment,
    Body(target): Body<BalloonTarget>,
) -> Answer<BalloonInfo> {
    let object = object("machine", &name);
    daemon.permit(&actor, Action::Adjust, &object, about(&name))?;
    let entry = with_balloon(&daemon, &name)?;
    let info = call(&entry, move |client| client.inflate(target.target_mib)).await?;
    daemon.audit.noted("balloon", &object, &format!("asked to give back {} MiB", target.target_mib));
    Ok(Json(info))
}

async fn dirty_rate(
    State(daemon): State<Shared>,
    Extension(actor): From,
    Segment(name): Segment,
    Body(request): Body<DirtyRateRequest>,
) -> Answer<DirtyRate> {
    daemon.permit(&actor, Action::View, &object("machine", &name), about(&name))?;
    let entry = daemon.machines.get(&name)?;
    Ok(Json(crate::machine::dirty_rate::estimate(&entry, request).await?))
}

async fn resize_disk(
    State(daemon): State<Shared>,
    Extension(actor): From,
    Segment(name): Segment,
    Body(size): Body<DiskSize>,
) -> Answer<Machine> {
    let object = object("machine", &name);
    daemon.permit(&actor, Action::Adjust, &object, about(&name))?;
    let detail = format!("disk {} has {} bytes", size.id.escape_debug(), size.bytes);
    let shared = Shared::clone(&daemon);
    let machine = spawned(async move { shared.machines.resize_disk(&name, &size).await }).await??;
    daemon.audit.noted("disk resized", &object, &detail);
    Ok(Json(machine))
}

async fn attach_disk(
    State(daemon): State<Shared>,
    Extension(actor): From,
    Segment(name): Segment,
    Body(new): Body<NewDisk>,
) -> Answer<Machine> {
    let object = object("machine", &name);
    daemon.permit(&actor, Action::Adjust, &object, about(&name))?;
    let shared = Shared::clone(&daemon);
    let machine = spawned(async move { shared.machines.attach_disk(&name, &new).await }).await??;
    if let Some(disk) = machine.disks.last() {
        daemon.audit.noted("disk attached", &object, &format!("disk {}: {}", disk.id, disk.path.display()));
    }
    Ok(Json(machine))
}

async fn detach_disk(
    State(daemon): State<Shared>,
    Extension(actor): From,
    Segment(name): Segment,
    Body(which): Body<DetachDisk>,
) -> Answer<Disk> {
    let object = object("machine", &name);
    daemon.permit(&actor, Action::Adjust, &object, about(&name))?;
    let shared = Shared::clone(&daemon);
    let disk = spawned(async move { shared.machines.detach_disk(&name, &which.id).await }).await??;
    daemon.audit.noted("disk detached", &object, &format!("disk {}: {} stays", disk.id, disk.path.display()));
    Ok(Json(disk))
}

async fn events(State(daemon): State<Shared>, Extension(actor): From) -> Answer<Vec<Event>> {
    daemon.permit(&actor, Action::View, "events", Object::default())?;
    Ok(Json(daemon.all_events()))
}

async fn add_event(
    State(daemon): State<Shared>,
    Extension(actor): From,
    Body(new): Body<NewEvent>,
) -> Result<Response, Failure> {
    daemon.permit(&actor, Action::Event, &format!("event:{}", new.name.escape_debug()), Object::default())?;
    Ok((StatusCode::CREATED, Json(daemon.add_event(new)?)).into_response())
}

async fn remove_event(
    State(daemon): State<Shared>,
    Extension(actor): From,
    Segment(id): Segment,
) -> Result<StatusCode, Failure> {
    daemon.permit(&actor, Action::Event, &object("event", &id), Object::default())?;
    daemon.remove_event(&id)?;
    Ok(StatusCode::NO_CONTENT)
}

async fn plans(State(daemon): State<Shared>, Extension(actor): From) -> Answer<Vec<Plan>> {
    daemon.permit(&actor, Action::View, "plans", Object::default())?;
    Ok(Json(daemon.plans()?))
}

async fn audit(State(daemon): State<Shared>, Extension(actor): From, Limit(limit): Limit) -> Answer<Vec<AuditRecord>> {
    daemon.permit(&actor, Action::Audit, "audit", Object::default())?;
    Ok(Json(daemon.store.audit(limit)?))
}

/// `kind:name`, harmless in a log whatever the name is.
pub(super) fn object(kind: &str, name: &str) -> String {
    let name: String = name.chars().take(80).collect();
    format!("{kind}:{}", name.escape_debug())
}

pub(super) fn about(machine: &str) -> Object<'_> {
    Object { machine: Some(machine), pool: None }
}

async fn spawned<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> Result<T, Failure> {
    let failed = |error| Failure::new(500, "internal", format!("the request ended unexpectedly: {error}"));
    tokio::spawn(work).await.map_err(failed)
}
