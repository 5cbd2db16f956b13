//! Codebooks in integers: `factor * values` stands for the table, the factor chosen so that rounding costs least.
//!
//! The values of a table keep their ratios whatever they are multiplied with, but not their distance to the nearest
//! integer. Tables of integers are exact, FP4's thirds become so times a multiple of 3, and NF4 in int8 loses half as
//! much as without the choice.

use std::collections::HashMap;
use std::sync::{LazyLock, PoisonError, RwLock};

use crate::codebook::LEN;

/// A codebook as `factor * values`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Rounded<T> {
    pub(super) values: [T; LEN],
    pub(super) factor: f32,
}

/// Tables already rounded, by the bits of their values.
pub(super) type Known<T> = LazyLock<RwLock<HashMap<[u32; LEN], Rounded<T>>>>;

/// An integer that codes are multiplied as.
pub(super) trait Integer: Copy + 'static {
    /// The integers that the largest value of a table may become, best of the equally good first. int16 keeps to 14
    /// bits: eight products of two of them are added in int32.
    fn tops() -> impl Iterator<Item = i16>;
    /// Conversion of a number that is one.
    fn from_f32(value: f32) -> Self;
    /// Tables that were rounded to this type before.
    fn known() -> &'static Known<Self>;
}

impl Integer for i16 {
    fn tops() -> impl Iterator<Item = i16> {
        (8192..=16383).rev()
    }

    fn from_f32(value: f32) -> Self {
        value as Self
    }

    fn known() -> &'static Known<Self> {
        static KNOWN: Known<i16> = LazyLock::new(RwLock::default);
        &KNOWN
    }
}

impl Integer for i8 {
    fn tops() -> impl Iterator<Item = i16> {
        (64..=127).rev()
    }

    fn from_f32(value: f32) -> Self {
        value as Self
    }

    fn known() -> &'static Known<Self> {
        static KNOWN: Known<i8> = LazyLock::new(RwLock::default);
        &KNOWN
    }
}

/// `values` in integers.
pub(super) fn to_integers<T: Integer>(values: &[f32; LEN]) -> Rounded<T> {
    let key = values.map(f32::to_bits);
    if let Some(rounded) = T::known().read().unwrap_or_else(PoisonError::into_inner).get(&key) {
        return *rounded;
    }
    let rounded = round(values);
    T::known().write().unwrap_or_else(PoisonError::into_inner).insert(key, rounded);
    rounded
}

fn round<T: Integer>(values: &[f32; LEN]) -> Rounded<T> {
    let limit = values.iter().fold(0.0_f32, |limit, v| limit.max(v.abs()));
    if limit == 0.0 {
        return Rounded { values: [T::from_f32(0.0); LEN], factor: 1.0 };
    }
    let error = |multiplier: f32| -> f64 {
        let off = |v: f32| f64::from((v * multiplier).round_ties_even()) / f64::from(multiplier) - f64::from(v);
        values.iter().map(|&v| off(v).powi(2)).sum()
    };
    let (mut chosen, mut least) = (1.0, f64::INFINITY);
    for multiplier in T::tops().map(|top| f32::from(top) / limit) {
        let error = error(multiplier);
        if error < least {
            (chosen, least) = (multiplier, error);
        }
    }
    Rounded { values: values.map(|v| T::from_f32((v * chosen).round_ties_even())), factor: 1.0 / chosen }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codebook;

    /// Largest error relative to the largest value.
    fn error<T: Integer + Into<f32>>(values: &[f32; LEN]) -> f32 {
        let rounded = to_integers::<T>(values);
        let limit = values.iter().fold(0.0_f32, |limit, v| limit.max(v.abs()));
        let off = values.iter().zip(rounded.values).map(|(v, r)| (r.into() * rounded.factor - v).abs() / limit);
        off.fold(0.0, f32::max)
    }

    #[test]
    fn integers_are_exact() {
        for table in [codebook::int4(), codebook::uint4()] {
            assert!(error::<i16>(table.values()) < 1e-7);
            assert!(error::<i8>(table.values()) < 1e-7);
        }
    }

    #[test]
    fn other_tables_lose_half_a_step_at_most() {
        for table in [codebook::nf4(), codebook::fp4()] {
            assert!(error::<i16>(table.values()) < 0.5 / 8191.0);
            assert!(error::<i8>(table.values()) < 0.5 / 63.0);
        }
    }

    #[test]
    fn a_table_of_zeros_stays_zero() {
        assert_eq!(to_integers::<i8>(&[0.0; LEN]).values, [0; LEN]);
        assert_eq!(to_integers::<i16>(&[0.0; LEN]).values, [0; LEN]);
    }
}
