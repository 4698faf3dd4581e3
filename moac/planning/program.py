"""The planning program as one sparse matrix, handed to HiGHS in a single call."""

from __future__ import annotations

from dataclasses import dataclass, field

import highspy
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class Program:
    """Binary columns and rows collected as arrays; `build` makes a `HighsLp` to minimise of them.

    `cost` `[columns]`.
    """

    cost: Floats
    rows: list[Ints] = field(default_factory=list)
    columns: list[Ints] = field(default_factory=list)
    values: list[Floats] = field(default_factory=list)
    row_lower: list[Floats] = field(default_factory=list)
    row_upper: list[Floats] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        """Rows added so far."""
        return sum(len(upper) for upper in self.row_upper)

    def add_rows(
        self, row: Ints, column: Ints, value: Floats | float, *, lower: Floats, upper: Floats
    ) -> None:
        """Add `len(upper)` rows; entry `i` stands at new row `row[i]`, column `column[i]`."""
        values = np.broadcast_to(np.asarray(value, dtype=np.float64), row.shape)
        used = np.abs(values) > 1e-9  # what HiGHS itself would drop, with a warning
        self.rows.append(row[used] + self.num_rows)
        self.columns.append(column[used])
        self.values.append(values[used])
        self.row_lower.append(lower)
        self.row_upper.append(upper)

    def build(self) -> highspy.HighsLp:
        """The program in HiGHS's own form, rows in compressed order."""
        rows, columns = np.concatenate(self.rows), np.concatenate(self.columns)
        order = np.lexsort((columns, rows))
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = len(self.cost), self.num_rows
        lp.col_cost_ = self.cost
        lp.col_lower_, lp.col_upper_ = np.zeros(len(self.cost)), np.ones(len(self.cost))
        lp.row_lower_ = np.concatenate(self.row_lower)
        lp.row_upper_ = np.concatenate(self.row_upper)
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.num_col_, lp.a_matrix_.num_row_ = lp.num_col_, lp.num_row_
        counts = np.bincount(rows, minlength=lp.num_row_)
        lp.a_matrix_.start_ = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        lp.a_matrix_.index_ = columns[order].astype(np.int32)
        lp.a_matrix_.value_ = np.concatenate(self.values)[order]
        lp.integrality_ = [highspy.HighsVarType.kInteger] * len(self.cost)
        return lp
