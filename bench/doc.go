// Package bench measures datapaths side by side: all in one run on one machine,
// between the nodes of a lab or between two real hosts. It starts the datapaths and
// chooses the workloads. The traffic comes from bench/load and the nodes from
// internal/lab; the daemons and other programs keep their own state. The package's own
// state is the Report, which bench/report shows.
//
//	Run ── for each underlay profile
//	        start each datapath in a separate lab       datapath.go, node.go
//	        for each round: for each workload:
//	          for each datapath: measure                  workload.go, cost.go
//	     ── Report, kept as JSON                            report.go
//
// Rounds are interleaved, so that a drift of the machine affects all datapaths
// alike. A datapath is idle while another is measured.
package bench
