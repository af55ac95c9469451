// Package bench measures datapaths side by side: every one in the same run, on
// the same machine, between two nodes of a lab or two real hosts.
//
//	Run ── for each underlay profile
//	        start every datapath in a lab of its own    datapath.go, node.go
//	        for each round: for each workload:
//	          for each datapath: measure                  workload.go, cost.go
//	     ── Report                                          report.go
//	          table, CSV, Go benchmark format, page, comparison
//
// Rounds are interleaved: a drift of the machine meets all datapaths alike.
// Datapaths that wait for their turn do nothing.
package bench
