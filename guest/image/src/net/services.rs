//! What the guest does with the data that arrives on its sockets.

use alloc::vec;
use alloc::vec::Vec;

use smoltcp::socket::{tcp, udp};

use super::Control;

/// No reply to a control request is longer, in bytes.
const REPLY_BYTES_MAX: usize = 4096;

/// Sends every datagram back to where it came from.
pub fn echo_datagrams(socket: &mut udp::Socket<'_>) {
    while socket.can_send()
        && let Ok((data, metadata)) = socket.recv()
    {
        // The borrow of the received data ends with its copy.
        let data = Vec::from(data);
        if socket.send_slice(&data, metadata.endpoint).is_err() {
            break;
        }
    }
}

/// Answers every control datagram.
pub fn control_datagrams(socket: &mut udp::Socket<'_>, control: &mut impl Control) {
    while socket.can_send()
        && let Ok((data, metadata)) = socket.recv()
    {
        let reply = control.answer(data);
        if socket.send_slice(&reply, metadata.endpoint).is_err() {
            break;
        }
    }
}

/// Sends back what arrives, as far as the other side takes it; closes when it has closed.
pub fn echo_stream(socket: &mut tcp::Socket<'_>) {
    const PIECE: usize = 4096;
    let mut piece = [0; PIECE];
    while socket.can_recv() && socket.can_send() {
        let room = (socket.send_capacity() - socket.send_queue()).min(PIECE);
        match socket.recv_slice(&mut piece[..room]) {
            Ok(bytes) if bytes != 0 => {
                // There is room for it all.
                let _ = socket.send_slice(&piece[..bytes]);
            }
            _ => break,
        }
    }
    close_after_peer(socket);
}

/// Answers every line; one that is longer than `line_max` ends the connection.
pub fn control_stream(socket: &mut tcp::Socket<'_>, control: &mut impl Control, line_max: usize) {
    while socket.can_recv() && socket.may_send() && socket.send_capacity() - socket.send_queue() >= REPLY_BYTES_MAX {
        let mut line = vec![0; line_max + 1];
        let peeked = socket.peek_slice(&mut line).unwrap_or(0);
        let Some(end) = line[..peeked].iter().position(|&byte| byte == b'\n') else {
            if peeked > line_max {
                socket.abort();
            }
            break;
        };
        let mut reply = control.answer(&line[..end]);
        reply.push(b'\n');
        // There is room for it, and the line is what was peeked at.
        let _ = (socket.send_slice(&reply), socket.recv_slice(&mut line[..=end]));
    }
    close_after_peer(socket);
}

/// Closes our half once the peer has closed its own and all that it sent was dealt with. An unfinished control line is
/// never finished then, so it does not count.
fn close_after_peer(socket: &mut tcp::Socket<'_>) {
    let finished = !socket.can_recv() || (socket.can_send() && socket.send_queue() == 0);
    if socket.state() == tcp::State::CloseWait && finished {
        socket.close();
    }
}
