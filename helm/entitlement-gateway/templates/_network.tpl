{{/* Rules of NetworkPolicies. All take a scope. */}}
{{- define "entitlement-gateway.egress.dns" -}}
- ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- end -}}

{{- define "entitlement-gateway.egress.redis" -}}
{{- if .Values.trial.enabled -}}
- ports: [{port: 6379}]
  to: [{podSelector: {matchLabels: {{ include "entitlement-gateway.selector" (list . "trial-valkey") | fromYaml | toJson }}}}]
{{- else -}}
- ports: [{port: {{ int64 .Values.networkPolicy.redis.port }}}]
  {{- with .Values.networkPolicy.redis.to }}
  to: {{ toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
{{- end -}}

{{- define "entitlement-gateway.egress.postgresql" -}}
{{- if .Values.trial.enabled -}}
- ports: [{port: 5432}]
  to: [{podSelector: {matchLabels: {{ include "entitlement-gateway.selector" (list . "trial-postgresql") | fromYaml | toJson }}}}]
{{- else -}}
- ports: [{port: {{ int64 .Values.networkPolicy.postgresql.port }}}]
  {{- with .Values.networkPolicy.postgresql.to }}
  to: {{ toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
{{- end -}}

{{- define "entitlement-gateway.egress.tracing" -}}
{{- with .Values.tracing.endpoint }}
- ports: [{port: {{ regexFind "[0-9]+$" . }}}]
{{- end }}
{{- end -}}

{{/* Peers: the release's pods of some components: (list scope component...). */}}
{{- define "entitlement-gateway.peers" -}}
{{- $scope := first . -}}
{{- range rest . }}
- podSelector:
    matchLabels: {{ include "entitlement-gateway.selector" (list $scope .) | nindent 6 }}
{{- end }}
{{- end -}}
