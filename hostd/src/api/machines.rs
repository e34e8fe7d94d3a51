//! Machines in the control API.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use axum::{Extension, Json};

use vmm::api::{BalloonInfo, BalloonTarget};

use super::body::{Answer, Body, Segment};
use super::problem::Failure;
use super::subject::{about, object};
use super::types::{
    CreateMachine, DetachDisk, DirtyRate, DirtyRateRequest, Disk, DiskSize, Machine, NewDisk, StopMachine,
};
use super::{Route, Shared, route};
use crate::executor::ExecutorError;
use crate::machine::entry::Entry;
use crate::machine::registry::call;
use crate::security::access::{Action, Actor, Object};

type From = Extension<Actor>;

/// Their routes.
pub(super) fn routes() -> Vec<Route> {
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

async fn machines(State(daemon): State<Shared>, Extension(actor): From) -> Answer<Vec<Machine>> {
    daemon.permit(&actor, Action::View, "machines", Object::default())?;
    Ok(Json(daemon.machines.views()))
}

async fn create_machine(
    State(daemon): State<Shared>,
    Extension(actor): From,
    Body(new): Body<CreateMachine>,
) -> Result<Response, Failure> {
    let what = object("machine", &new.name);
    daemon.permit(&actor, Action::Create, &what, about(&new.name))?;
    daemon.permit_files(&actor, Action::Create, &what, new.files())?;
    if daemon.gate.closed() {
        return Err(ExecutorError::Draining(daemon.config.host.clone()).into());
    }
    if let Some(host) = daemon.host_of(&new.name) {
        let detail = format!("a machine `{}` is on host `{host}` already: choose another name", new.name);
        return Err(Failure::new(409, "machine-exists", detail));
    }
    // In a task of its own: a client that hangs up does not leave half a machine.
    let shared = Shared::clone(&daemon);
    let made = spawned(async move { shared.machines.create(&new).await }).await?;
    let detail = made
        .as_ref()
        .map_or_else(|error| format!("failed: {}", crate::machine::chain(error)), |_| "running".to_owned());
    daemon.audit.noted("created", &what, &detail);
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
    daemon.permit_files(&actor, Action::Adjust, &object, new.path.as_deref().into_iter())?;
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

async fn spawned<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> Result<T, Failure> {
    let failed = |error| Failure::new(500, "internal", format!("the request ended unexpectedly: {error}"));
    tokio::spawn(work).await.map_err(failed)
}
