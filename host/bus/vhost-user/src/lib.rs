//! cofferdam-bus-vhost-user.
