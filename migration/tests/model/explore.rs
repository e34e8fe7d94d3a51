//! Breadth-first search over all states, then backwards over what the parties do, to see from where a good end can be reached.

use std::collections::{HashMap, HashSet};
use std::fmt::Write;

use migration::control::Phase;

use crate::rules::{Mutation, Next, broken, is_good, is_over, must_survive};
use crate::state::State;
use crate::{daemon, engine, faults};

/// What was found.
pub struct Explored {
    pub states: usize,
    pub steps: usize,
    /// (at the source, phase).
    pub phases: HashSet<(bool, Phase)>,
    /// A rule that is broken, and the shortest way there.
    pub found: Option<String>,
}

#[derive(Default)]
struct Graph {
    numbers: HashMap<State, u32>,
    states: Vec<State>,
    /// Where each state was first reached from, and how.
    from: Vec<(u32, &'static str)>,
    /// Steps of the parties, without faults, backwards: (to, from).
    progress: Vec<(u32, u32)>,
    steps: usize,
}

impl Graph {
    fn add(&mut self, state: State, from: u32, name: &'static str) -> u32 {
        let number = self.states.len() as u32;
        let known = *self.numbers.entry(state).or_insert(number);
        if known == number {
            self.states.push(state);
            self.from.push((from, name));
        }
        known
    }

    fn way_to(&self, number: u32) -> String {
        let (mut names, mut at) = (Vec::new(), number);
        while at != 0 {
            let (from, name) = self.from[at as usize];
            names.push(name);
            at = from;
        }
        let mut text = String::new();
        for (index, name) in names.iter().rev().enumerate() {
            let _ = write!(text, "\n  {}. {name}", index + 1);
        }
        let _ = write!(text, "\n{:#?}", self.states[number as usize]);
        text
    }

    /// The first state of which `needed` says that an end must be reachable, and from which none is.
    fn stuck(&self, needed: impl Fn(&State) -> bool, end: impl Fn(&State) -> bool) -> Option<u32> {
        let mut starts = vec![0u32; self.states.len() + 1];
        self.progress.iter().for_each(|&(to, _)| starts[to as usize + 1] += 1);
        for index in 1..starts.len() {
            starts[index] += starts[index - 1];
        }
        let (mut slots, mut into) = (starts.clone(), vec![0u32; self.progress.len()]);
        for &(to, from) in &self.progress {
            into[slots[to as usize] as usize] = from;
            slots[to as usize] += 1;
        }
        let mut reaches: Vec<bool> = self.states.iter().map(end).collect();
        let mut open: Vec<u32> = (0u32..).zip(&reaches).filter(|(_, good)| **good).map(|(number, _)| number).collect();
        while let Some(to) = open.pop() {
            for &from in &into[starts[to as usize] as usize..starts[to as usize + 1] as usize] {
                if !std::mem::replace(&mut reaches[from as usize], true) {
                    open.push(from);
                }
            }
        }
        (0u32..).zip(&self.states).find(|(number, state)| needed(state) && !reaches[*number as usize]).map(|(at, _)| at)
    }
}

/// All ways out of `state`.
fn ways_out<'a>(state: &'a State, mutation: Option<Mutation>) -> Next<'a> {
    let mut next = Next { mutation, from: state, steps: Vec::new() };
    engine::source(state, &mut next);
    engine::destination(state, &mut next);
    daemon::source(state, &mut next);
    daemon::destination(state, &mut next);
    faults::all(state, &mut next);
    next
}

/// Explores everything, or until a rule is broken.
pub fn explore(mutation: Option<Mutation>) -> Explored {
    let mut graph = Graph::default();
    let mut phases = HashSet::new();
    graph.add(State::first(), 0, "");
    let mut at = 0;
    let mut found = None;
    while at < graph.states.len() && found.is_none() {
        let state = graph.states[at];
        phases.extend(state.source.phase.map(|phase| (true, phase)));
        phases.extend(state.destination.phase.map(|phase| (false, phase)));
        if let Some(rule) = broken(&state) {
            found = Some(format!("{rule}:{}", graph.way_to(at as u32)));
        }
        for step in ways_out(&state, mutation).steps {
            graph.steps += 1;
            let to = graph.add(step.state, at as u32, step.name);
            if !step.fault && to != at as u32 {
                graph.progress.push((to, at as u32));
            }
        }
        at += 1;
    }
    if found.is_none() {
        let nowhere = graph.stuck(must_survive, is_good).map(|at| ("it runs nowhere for good", at));
        let stuck = nowhere.or_else(|| graph.stuck(|_| true, is_over).map(|at| ("it never ends", at)));
        found = stuck.map(|(rule, at)| format!("{rule}:{}", graph.way_to(at)));
    }
    Explored { states: graph.states.len(), steps: graph.steps, phases, found }
}
