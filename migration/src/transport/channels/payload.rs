//! Frames with pages and blocks: sent compressed where that pays, stored as they arrive.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::{BATCH_BYTES, Channel, Incoming};
use crate::guest::PAGE_BYTES;
use crate::transport::TransportError;
use crate::transport::pack::{Packer, Packing};
use crate::wire::WireError;
use crate::wire::frame::{self, BlockHeader, HEADER_BYTES, Kind, MAX_RUNS, PageRun, RunKind};

impl Channel {
    /// The bandwidth limit held the next frame back for so long: the link is slower than it looks.
    pub fn held_back(&mut self, time: Duration) {
        if let Some(packer) = &mut self.packer {
            packer.held_back(time);
        }
    }

    /// From here on, which frames are compressed, if the peer takes any.
    pub fn set_packing(&mut self, packing: Packing) {
        if let Some(packer) = &mut self.packer {
            packer.packing = packing;
        }
    }

    /// Whether pages may soon be sent as differences, so that copies of what is sent are worth their memory.
    pub fn wants_copies(&self) -> bool {
        self.packer.as_ref().is_some_and(Packer::wants_copies)
    }

    /// Whether the next page frame should hold differences where it can.
    pub fn differences_pay(&mut self) -> bool {
        self.packer.as_mut().is_some_and(Packer::differences_pay)
    }

    /// Sends a page frame: `data` holds the pages of the runs that are not zero, one after the other. Returns the bytes
    /// put on the wire, before TLS.
    ///
    /// # Errors
    ///
    /// [`TransportError`].
    pub fn send_pages(&mut self, runs: &[PageRun], data: &[u8]) -> Result<u64, TransportError> {
        debug_assert!(runs.len() <= MAX_RUNS && frame::data_bytes(runs) == data.len() as u64);
        let mut table = std::mem::take(&mut self.scratch);
        table.clear();
        frame::encode_table(runs, &mut table);
        let differences = runs.iter().any(|run| run.kind == RunKind::Delta);
        let sent = self.send_payload(Kind::Pages, &table, data, differences);
        self.scratch = table;
        self.stream.flush()?;
        sent
    }

    /// Sends a block frame; written out when a batch is full. Returns the bytes put on the wire, before TLS.
    ///
    /// # Errors
    ///
    /// [`TransportError`].
    pub fn send_block(&mut self, disk: u16, block: u64, data: &[u8]) -> Result<u64, TransportError> {
        self.send_payload(Kind::Block, &BlockHeader { disk, block }.encode(), data, false)
    }

    /// Sends a frame with much data, compressed where that pays; written out batch by batch.
    fn send_payload(&mut self, kind: Kind, head: &[u8], data: &[u8], differences: bool) -> Result<u64, TransportError> {
        let Some(mut packer) = self.packer.take() else { return self.send_parts(kind, head, data) };
        let packed = if data.is_empty() { None } else { packer.pack(kind, head, data, differences) };
        let start = Instant::now();
        let sent = match packed {
            Some((header, packed)) => self.send_parts(Kind::Packed, &header.encode(), packed),
            None => self.send_parts(kind, head, data),
        }?;
        if !data.is_empty() {
            packer.sent(sent as usize, start);
        }
        self.packer = Some(packer);
        Ok(sent)
    }

    fn send_parts(&mut self, kind: Kind, head: &[u8], data: &[u8]) -> Result<u64, TransportError> {
        let header = self.header(kind, head.len() + data.len())?;
        // The head has a record of its own, so that records of page data begin at a page: the receiver then stores them
        // without putting pages together from pieces.
        self.stream.queue(&[&header, head].concat())?;
        for part in data.chunks(BATCH_BYTES) {
            if self.stream.queue(part)? >= BATCH_BYTES {
                self.stream.flush()?;
            }
        }
        Ok((HEADER_BYTES + head.len() + data.len()) as u64)
    }

    /// Bytes of the payload that is being read, at least one: of the frame that was unpacked, or as they arrive.
    fn fill(&mut self, doing: &'static str) -> Result<&[u8], TransportError> {
        if self.unpacked.rest().is_empty() { self.stream.fill(doing) } else { Ok(self.unpacked.rest()) }
    }

    fn consume(&mut self, bytes: usize) {
        if self.unpacked.rest().is_empty() {
            self.stream.consume(bytes);
        } else {
            self.unpacked.consume(bytes);
        }
    }

    fn read_exact(&mut self, mut buffer: &mut [u8], doing: &'static str) -> Result<(), TransportError> {
        while !buffer.is_empty() {
            let chunk = self.fill(doing)?;
            let take = chunk.len().min(buffer.len());
            let (now, later) = buffer.split_at_mut(take);
            now.copy_from_slice(&chunk[..take]);
            buffer = later;
            self.consume(take);
        }
        Ok(())
    }

    /// Reads a packed frame to its end; what it holds is read next.
    pub(super) fn unpack(&mut self, length: u32, doing: &'static str) -> Result<Incoming, TransportError> {
        self.payload(length, doing)?;
        let header = self.unpacked.unpack(&self.scratch)?;
        Ok(match header.kind {
            Kind::Block => Incoming::Block { length: header.length },
            _ => Incoming::Pages { length: header.length },
        })
    }

    /// Reads the rest of a page frame. Hands its runs to `zero` or, page data as it arrives and never less than a page,
    /// to `store` or `apply`. Returns the bytes that the frame took on the wire, before TLS.
    ///
    /// # Errors
    ///
    /// [`TransportError`], or what `sink` returns.
    pub fn read_pages<E: From<TransportError>>(
        &mut self,
        length: u32,
        pages: u64,
        sink: &mut dyn PageSink<Error = E>,
    ) -> Result<u64, E> {
        const DOING: &str = "receiving pages";
        let mut head = [0; frame::table_head_bytes()];
        if (length as usize) < head.len() {
            let detail = format!("{length} bytes are less than a table");
            return Err(TransportError::from(WireError::Malformed { kind: "page frame", detail }).into());
        }
        self.read_exact(&mut head, DOING)?;
        let count = frame::decode_table_head(&head, length).map_err(TransportError::from)?;
        let mut table = std::mem::take(&mut self.scratch);
        table.resize(frame::table_bytes(count) - head.len(), 0);
        self.read_exact(&mut table, DOING)?;
        let mut runs = std::mem::take(&mut self.runs);
        frame::decode_runs(&table, length, pages, &mut runs).map_err(TransportError::from)?;
        self.scratch = table;
        for run in &runs {
            match run.kind {
                RunKind::Zero => sink.zero(run.first..run.first + u64::from(run.count))?,
                RunKind::Data | RunKind::Delta => self.read_run(run, sink)?,
            }
        }
        self.runs = runs;
        Ok(HEADER_BYTES as u64 + u64::from(length))
    }

    fn read_run<E: From<TransportError>>(
        &mut self,
        run: &PageRun,
        sink: &mut dyn PageSink<Error = E>,
    ) -> Result<(), E> {
        const PAGE: usize = PAGE_BYTES as usize;
        let (mut page, end) = (run.first, run.first + u64::from(run.count));
        let delta = run.kind == RunKind::Delta;
        if !delta {
            sink.announce(page..end);
        }
        let mut take = |page, data: &[u8]| if delta { sink.apply(page, data) } else { sink.store(page, data) };
        while page < end {
            let chunk = self.fill("receiving pages")?;
            let whole = (chunk.len() / PAGE).min((end - page) as usize);
            if whole > 0 {
                take(page, &chunk[..whole * PAGE])?;
                self.consume(whole * PAGE);
                page += whole as u64;
            } else {
                // Only from a sender that lays its records out otherwise.
                let mut carry = [0; PAGE];
                self.read_exact(&mut carry, "receiving pages")?;
                take(page, &carry)?;
                page += 1;
            }
        }
        Ok(())
    }

    /// Reads the rest of a block frame. The data is valid until the next call.
    ///
    /// # Errors
    ///
    /// [`TransportError`].
    pub fn read_block(&mut self, length: u32) -> Result<(BlockHeader, &[u8]), TransportError> {
        let payload = if self.unpacked.rest().is_empty() {
            self.payload(length, "receiving blocks")?
        } else {
            self.unpacked.take()
        };
        Ok(BlockHeader::decode(payload)?)
    }
}

/// Where received pages go.
pub trait PageSink {
    /// Of the sink.
    type Error;

    /// These pages are about to be stored.
    fn announce(&mut self, pages: Range<u64>) {
        let _ = pages;
    }

    /// Stores whole pages from `first` on.
    ///
    /// # Errors
    ///
    /// Of the sink.
    fn store(&mut self, first: u64, data: &[u8]) -> Result<(), Self::Error>;

    /// Turns whole pages from `first` on into what they become by these differences.
    ///
    /// # Errors
    ///
    /// Of the sink.
    fn apply(&mut self, first: u64, differences: &[u8]) -> Result<(), Self::Error>;

    /// Makes pages read as zeroes.
    ///
    /// # Errors
    ///
    /// Of the sink.
    fn zero(&mut self, pages: Range<u64>) -> Result<(), Self::Error>;
}
