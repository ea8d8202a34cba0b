{{/* Files that are valid as they stand: rules and triggers hold PromQL, whose own braces would fight with templates. */}}

{{/* The list in `file`, with the release's names and the values of `numbers` filled in for the words in capitals. */}}
{{- define "sps2.filledIn" -}}
{{- $text := .root.Files.Get .file -}}
{{- $monitoring := .root.Values.monitoring -}}
{{- range $name, $value := merge dict (default dict .signals) $monitoring.slo $monitoring.thresholds }}
{{- $text = regexReplaceAll (printf "\\bVALUE_%s\\b" $name) $text (include "sps2.scalar" $value) }}
{{- end }}
{{- $words := dict
  "SCOPE" (printf "namespace=%q, release=%q" .root.Release.Namespace .root.Release.Name)
  "NAMESPACE" .root.Release.Namespace
  "RELEASE" .root.Release.Name
  "FULLNAME" (include "sps2.fullname" .root)
  "RUNBOOKS" $monitoring.prometheusRule.runbooks
  "PROMETHEUS" $monitoring.prometheus
}}
{{- range $word, $text_ := $words }}
{{- $text = regexReplaceAllLiteral (printf "\\b%s\\b" $word) $text $text_ }}
{{- end }}
{{- $text }}
{{- end }}
