// Package report shows what package bench measured: as tables, ratios, CSV, Go's
// benchmark format and a page with charts, and as the comparison of two reports. It
// measures nothing and holds no state: the figures, and their form as JSON, are
// bench.Report's.
//
//	bench.Report ──┬── table.go, ratios.go, scale.go   tables for a terminal
//	               ├── csv.go                           for other programs
//	               ├── page.go, chart.go, summary.go    one page of HTML
//	               ├── docs.go                          docs/benchmarks.md
//	               └── compare.go                       two reports, beyond noise
package report

import "culvert/bench"

// view is a report to be shown.
type view struct{ *bench.Report }
