//! What each of several things costs, when many measurements give the cost of all of them together.

/// Weighted least squares: the costs `x` for which `rows · x` comes nearest to `totals`, deviations being counted
/// relative to each total. `None` when the rows do not tell the things apart.
pub(super) fn solve<const N: usize>(rows: &[[f64; N]], totals: &[f64]) -> Option<[f64; N]> {
    let mut matrix = [[0.0; N]; N];
    let mut vector = [0.0; N];
    for (row, total) in rows.iter().zip(totals) {
        let weight = 1.0 / (total * total);
        for i in 0..N {
            vector[i] += weight * row[i] * total;
            for j in 0..N {
                matrix[i][j] += weight * row[i] * row[j];
            }
        }
    }
    eliminate(matrix, vector)
}

/// Gauss's elimination with the largest pivot, scaled by the diagonal first.
fn eliminate<const N: usize>(mut matrix: [[f64; N]; N], mut vector: [f64; N]) -> Option<[f64; N]> {
    let mut scale = [0.0; N];
    for i in 0..N {
        scale[i] = matrix[i][i].sqrt();
        if scale[i] == 0.0 {
            return None;
        }
    }
    for i in 0..N {
        vector[i] /= scale[i];
        for j in 0..N {
            matrix[i][j] /= scale[i] * scale[j];
        }
    }
    for column in 0..N {
        let pivot = (column..N)
            .max_by(|&a, &b| matrix[a][column].abs().total_cmp(&matrix[b][column].abs()))?;
        if matrix[pivot][column].abs() < 1e-12 {
            return None;
        }
        matrix.swap(column, pivot);
        vector.swap(column, pivot);
        let (above, top) = (matrix[column], vector[column]);
        for row in column + 1..N {
            let factor = matrix[row][column] / above[column];
            for (cell, over) in matrix[row].iter_mut().zip(above) {
                *cell -= factor * over;
            }
            vector[row] -= factor * top;
        }
    }
    for row in (0..N).rev() {
        let known: f64 = (row + 1..N).map(|j| matrix[row][j] * vector[j]).sum();
        vector[row] = (vector[row] - known) / matrix[row][row];
    }
    for i in 0..N {
        vector[i] /= scale[i];
    }
    Some(vector)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_are_found_again() {
        let costs = [20_000.0, 12.5, 400.0];
        let rows: Vec<[f64; 3]> = (0..12_u32)
            .map(|i| {
                let pages = f64::from(1 << (10 + i % 4));
                [1.0, pages * 16.0, f64::from(50 + 70 * (i * i % 7))]
            })
            .collect();
        let totals: Vec<f64> = rows
            .iter()
            .map(|row| {
                row.iter()
                    .zip(costs)
                    .map(|(count, cost)| count * cost)
                    .sum()
            })
            .collect();
        let found = solve(&rows, &totals).unwrap();
        for (found, cost) in found.iter().zip(costs) {
            assert!((found / cost - 1.0).abs() < 1e-6, "{found} is not {cost}");
        }
    }

    #[test]
    fn things_that_always_come_together_cannot_be_told_apart() {
        let rows = [[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]];
        assert_eq!(solve(&rows, &[1.0, 2.0, 3.0]), None);
        assert_eq!(solve(&[[1.0, 0.0]], &[1.0]), None);
    }
}
