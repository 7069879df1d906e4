//! What two agents say to each other: the tunnel's wire protocol.
