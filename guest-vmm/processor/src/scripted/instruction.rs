//! The instructions of scripts and their encoding: one opcode byte, then the operands, little endian.

use crate::VpIndex;

/// How many bytes one access moves.
pub(super) const MAX_ACCESS: u8 = 8;

/// One instruction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Instruction {
    /// Writes the bytes to the port, one at a time.
    Out { port: u16, data: Vec<u8> },
    /// Writes the low `width` bytes of the value to the port, at once.
    OutValue { port: u16, width: u8, value: u32 },
    /// Reads a byte from a port and writes it to the other.
    Echo { from: u16, to: u16 },
    /// Writes up to eight bytes to an address, at once: to memory or to a register.
    Write { address: u64, data: Vec<u8> },
    /// Reads up to eight bytes from an address, at once, and writes them to the port, one at a time.
    Read { address: u64, len: u8, port: u16 },
    /// Waits for an interrupt.
    Halt,
    /// Does nothing for ever.
    Spin,
    /// Goes on at the address.
    Jump { target: u64 },
    /// Ends the VP with a fault.
    Fault,
    /// Ends the VP with a fault of this name, in UTF-8.
    FaultNamed { reason: Vec<u8> },
    /// Ends the VP with a triple fault.
    TripleFault,
    /// Starts a VP that waits for it, at the address; does nothing if there is none or it does not wait.
    StartVp { vp: VpIndex, target: u64 },
    /// Reads a byte from the port until one of the mask's bits is set in it.
    Poll { port: u16, mask: u8 },
    /// Sets the counter.
    SetCounter { value: u64 },
    /// Takes one from the counter, and goes on at the address unless it is zero now.
    Repeat { target: u64 },
    /// Writes the vector of the last interrupt to the port.
    OutVector { port: u16 },
}

/// Why bytes are no instruction.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum DecodeError {
    /// No instruction begins with this.
    Opcode(u8),
    /// The instruction has more bytes than there are.
    Truncated,
    /// An access of that many bytes.
    Width(u8),
}

impl Instruction {
    /// Appends the encoding.
    pub(super) fn encode(&self, code: &mut Vec<u8>) {
        match self {
            Self::Out { port, data } => put(code, 1, &[&port.to_le_bytes(), &length(data), data]),
            Self::OutValue { port, width, value } => {
                put(code, 2, &[&port.to_le_bytes(), &[*width], &value.to_le_bytes()]);
            }
            Self::Echo { from, to } => put(code, 3, &[&from.to_le_bytes(), &to.to_le_bytes()]),
            Self::Write { address, data } => {
                put(code, 4, &[&address.to_le_bytes(), &length(data)[..1], data]);
            }
            Self::Read { address, len, port } => {
                put(code, 5, &[&address.to_le_bytes(), &[*len], &port.to_le_bytes()]);
            }
            Self::Halt => put(code, 6, &[]),
            Self::Spin => put(code, 7, &[]),
            Self::Jump { target } => put(code, 8, &[&target.to_le_bytes()]),
            Self::Fault => put(code, 9, &[]),
            Self::StartVp { vp, target } => put(code, 10, &[&vp.0.to_le_bytes(), &target.to_le_bytes()]),
            Self::Poll { port, mask } => put(code, 11, &[&port.to_le_bytes(), &[*mask]]),
            Self::SetCounter { value } => put(code, 12, &[&value.to_le_bytes()]),
            Self::Repeat { target } => put(code, 13, &[&target.to_le_bytes()]),
            Self::OutVector { port } => put(code, 14, &[&port.to_le_bytes()]),
            Self::FaultNamed { reason } => put(code, 15, &[&length(reason), reason]),
            Self::TripleFault => put(code, 16, &[]),
        }
    }

    /// Decodes the instruction that the bytes begin with. Returns it and its length.
    pub(super) fn decode(code: &[u8]) -> Result<(Self, usize), DecodeError> {
        let mut rest = Operands(code);
        let instruction = match rest.byte()? {
            1 => {
                let port = rest.u16()?;
                let len = rest.u16()?;
                Self::Out { port, data: rest.bytes(len.into())?.to_vec() }
            }
            2 => Self::OutValue { port: rest.u16()?, width: port_width(rest.byte()?)?, value: rest.u32()? },
            3 => Self::Echo { from: rest.u16()?, to: rest.u16()? },
            4 => {
                let address = rest.u64()?;
                let len = access_width(rest.byte()?)?;
                Self::Write { address, data: rest.bytes(len.into())?.to_vec() }
            }
            5 => Self::Read { address: rest.u64()?, len: access_width(rest.byte()?)?, port: rest.u16()? },
            6 => Self::Halt,
            7 => Self::Spin,
            8 => Self::Jump { target: rest.u64()? },
            9 => Self::Fault,
            10 => Self::StartVp { vp: VpIndex(rest.u32()?), target: rest.u64()? },
            11 => Self::Poll { port: rest.u16()?, mask: rest.byte()? },
            12 => Self::SetCounter { value: rest.u64()? },
            13 => Self::Repeat { target: rest.u64()? },
            14 => Self::OutVector { port: rest.u16()? },
            15 => {
                let len = rest.u16()?;
                Self::FaultNamed { reason: rest.bytes(len.into())?.to_vec() }
            }
            16 => Self::TripleFault,
            opcode => return Err(DecodeError::Opcode(opcode)),
        };
        Ok((instruction, code.len() - rest.0.len()))
    }
}

fn put(code: &mut Vec<u8>, opcode: u8, operands: &[&[u8]]) {
    code.push(opcode);
    code.extend(operands.concat());
}

fn length(data: &[u8]) -> [u8; 2] {
    u16::try_from(data.len()).expect("the builder splits longer data").to_le_bytes()
}

fn port_width(width: u8) -> Result<u8, DecodeError> {
    if matches!(width, 1 | 2 | 4) { Ok(width) } else { Err(DecodeError::Width(width)) }
}

fn access_width(width: u8) -> Result<u8, DecodeError> {
    if matches!(width, 1..=MAX_ACCESS) { Ok(width) } else { Err(DecodeError::Width(width)) }
}

/// What is left of an instruction's bytes.
struct Operands<'a>(&'a [u8]);

impl<'a> Operands<'a> {
    fn bytes(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(DecodeError::Truncated)?;
        self.0 = rest;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (bytes, rest) = self.0.split_first_chunk().ok_or(DecodeError::Truncated)?;
        self.0 = rest;
        Ok(*bytes)
    }

    fn byte(&mut self) -> Result<u8, DecodeError> {
        Ok(self.array::<1>()?[0])
    }

    fn u16(&mut self) -> Result<u16, DecodeError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32, DecodeError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, DecodeError> {
        Ok(u64::from_le_bytes(self.array()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every_instruction() -> Vec<Instruction> {
        vec![
            Instruction::Out { port: 0x3f8, data: b"READY\n".to_vec() },
            Instruction::OutValue { port: 0x604, width: 2, value: 0x2000 },
            Instruction::Echo { from: 0x3f8, to: 0x3f9 },
            Instruction::Write { address: 0xfed0_0000, data: vec![1, 2, 3, 4] },
            Instruction::Read { address: 0xfed0_0000, len: 8, port: 0x3f8 },
            Instruction::Halt,
            Instruction::Spin,
            Instruction::Jump { target: 0x10_0000 },
            Instruction::Fault,
            Instruction::StartVp { vp: VpIndex(3), target: 0x8000 },
            Instruction::Poll { port: 0x3fd, mask: 1 },
            Instruction::SetCounter { value: u64::MAX },
            Instruction::Repeat { target: 0x10_0000 },
            Instruction::OutVector { port: 0x3f8 },
            Instruction::FaultNamed { reason: b"a reason".to_vec() },
            Instruction::TripleFault,
        ]
    }

    #[test]
    fn what_is_encoded_decodes() {
        for instruction in every_instruction() {
            let mut code = Vec::new();
            instruction.encode(&mut code);
            let len = code.len();
            code.push(0xff);
            assert_eq!(Instruction::decode(&code), Ok((instruction.clone(), len)));
            for shorter in 0..len {
                assert_eq!(
                    Instruction::decode(&code[..shorter]),
                    Err(DecodeError::Truncated),
                    "{instruction:?}"
                );
            }
        }
    }

    #[test]
    fn other_bytes_are_refused() {
        assert_eq!(Instruction::decode(&[0]), Err(DecodeError::Opcode(0)));
        assert_eq!(Instruction::decode(&[17]), Err(DecodeError::Opcode(17)));
        assert_eq!(Instruction::decode(&[2, 0, 0, 3, 0, 0, 0, 0]), Err(DecodeError::Width(3)));
        assert_eq!(Instruction::decode(&[4, 0, 0, 0, 0, 0, 0, 0, 0, 9]), Err(DecodeError::Width(9)));
    }
}
