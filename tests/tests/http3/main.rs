//! HTTP/3 against real processes: a member over the mesh port and a stranger over the public port, who send what the RFC
//! forbids; a member that answers so; clients that give up; and clients of other programs.

mod bad_answers;
mod bad_input;
mod manners;
mod others;
mod scene;
