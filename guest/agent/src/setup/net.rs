//! Network interfaces.

use std::net::IpAddr;

use tonic::Status;

use crate::proto;
use crate::validate::Invalid;

pub struct Interface {}

impl Interface {
    pub fn new(_from: &proto::Interface) -> Result<Self, Invalid> {
        Ok(Self {})
    }

    pub fn first_address(&self) -> Option<IpAddr> {
        None
    }
}

pub async fn apply(_interfaces: &[Interface]) -> Result<(), Status> {
    Ok(())
}
